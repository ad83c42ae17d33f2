"""The training loop: batches, steps, validation, saved states and exact resume.

A step's data are a function of the settings and the step's number alone, so a run that was
killed goes on from its last state as if nothing had happened: the same weights, bit for bit
(same machine, same number of threads). A state folder holds safetensors and JSON, no pickle.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from model import host
from model.batch import Encoding
from model.packing import pack
from model.tokenizer import NVEmbedTokenizer, Truncation
from model.training.attention import grouped_products
from model.training.examples import DataError, Example, is_held_out, read_examples, read_texts
from model.training.export import export
from model.training.losses import contrastive_loss, distillation_loss
from model.training.network import load_trained
from model.training.settings import TrainingSettings, TrainingSettingsError
from model.training.teacher import Projection, load_vectors

logger = logging.getLogger("nv_embed.training")
_KEPT_STATES = 2

Prompt = tuple[str, str]
"""(text, instruction)"""


class Shuffle:
    """Numbers 0 … count-1 in a new order every epoch; `draw` gives any step's share of them."""

    def __init__(self, count: int, seed: int, stream: int) -> None:
        assert count > 0
        self.count, self.seed, self.stream = count, seed, stream
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def draw(self, step: int, size: int) -> list[int]:
        """The rows of `step`, which sees `size` of them; may cross into the next epoch."""
        return [self._at(step * size + offset) for offset in range(size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, self.stream, epoch])
            self._epoch, self._order = epoch, rng.permutation(self.count)
        return int(self._order[place])


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a run learns from, and what it is measured on."""

    examples: list[Example]
    held_out: list[Example]
    texts: list[str]
    targets: NDArray[np.float32]  # [len(texts), D], the teacher's vectors, projected
    drawn: list[int]  # rows of texts from which a step's texts are drawn
    held_out_texts: list[int]  # rows of texts that are measured instead
    places: dict[str, int]  # text -> its row


def load_corpus(settings: TrainingSettings) -> Corpus:
    """Read all data; held-out texts go to validation and nowhere else. Raises DataError."""
    rng = np.random.default_rng([settings.seed, 99])
    examples: list[Example] = []
    held_out: list[Example] = []
    for name, weight in settings.data.items():
        rows = read_examples(Path(name))
        share = settings.validation_rows // len(settings.data)
        held_out += [row for row in rows if is_held_out(row.query)][:share]
        kept = [trained for row in rows if (trained := without_held_out(row))]
        whole, part = divmod(weight, 1)
        order = rng.permutation(len(kept))
        seen = [*np.tile(order, int(whole)), *order[: round(part * len(order))]]
        examples += [kept[i] for i in seen]
    if settings.data and not examples:
        raise DataError(f"{', '.join(settings.data)}: no example to train on")
    texts: list[str] = []
    targets = np.empty((0, 0), dtype=np.float32)
    if settings.texts:
        assert settings.vectors is not None
        assert settings.projection is not None
        texts = read_texts(Path(settings.texts))
        vectors = load_vectors(Path(settings.vectors))
        count = min(len(texts), len(vectors))
        if settings.last_text and count < settings.last_text:
            raise DataError(f"{settings.vectors} holds {count} vectors of {settings.last_text}")
        texts = texts[:count]
        targets = Projection.load(Path(settings.projection))(vectors[:count])
    span = range(settings.first_text, settings.last_text or len(texts))
    measured = [row for row in span if is_held_out(texts[row])][: settings.validation_rows]
    drawn = [row for row in span if not is_held_out(texts[row])]
    places = {text: row for row, text in enumerate(texts)}
    return Corpus(examples, held_out, texts, targets, drawn, measured, places)


def without_held_out(example: Example) -> Example | None:
    """The example as it may be trained on: no text of it is held out; None when it may not."""
    if is_held_out(example.query) or is_held_out(example.positive):
        return None
    kept = tuple(text for text in example.negatives if not is_held_out(text))
    return dataclasses.replace(example, negatives=kept)


class Trainer:
    """One run in one folder: `run()` starts it, or goes on where it stopped.

    The folder gets settings.json, metrics.jsonl, states in `state/` and, at the end, the
    exported checkpoint in `checkpoint/`.
    """

    def __init__(self, settings: TrainingSettings, folder: Path) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.folder = settings, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.start = Path(settings.model)
        self.tokenizer = NVEmbedTokenizer.from_dir(self.start)
        self.corpus = load_corpus(settings)
        self.model = load_trained(self.start, device=self.device, pooling=settings.pooling)
        self.attend = partial(grouped_products, causal=settings.causal)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step = 0
        self.autocast = _autocast_dtype(settings.dtype, self.device)
        self._pairs = Shuffle(len(self.corpus.examples) or 1, settings.seed, 1)
        self._texts = Shuffle(len(self.corpus.drawn) or 1, settings.seed, 2)
        torch.manual_seed(settings.seed)

    # The run

    def run(self, *, stop_after: int | None = None, progress: bool | None = None) -> Path | None:
        """Train to the end; returns the exported checkpoint (None of an ablation).

        stop_after: stop at this step without exporting, and return None (for tests).
        Raises TrainingSettingsError when the folder holds a run of other settings.
        """
        self._claim_folder()
        self._resume()
        steps = self.settings.steps
        disable = None if progress is None else not progress
        with tqdm(total=steps, initial=self.step, desc="Training", disable=disable) as bar:
            while self.step < steps:
                metrics = self._train_step()
                self.step += 1
                last = self.step == steps
                if last or self.step % self.settings.validate_every == 0:
                    metrics |= self.validate()
                self._log(metrics)
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.4f}")
                if last or self.step % self.settings.save_every == 0:
                    self.save()
                if stop_after == self.step:
                    return None
        if not self.settings.servable:
            return None
        tokenizer = self.start / "tokenizer.json"
        target = export(self.model, self.folder / "checkpoint", tokenizer)
        if self.settings.projection:
            shutil.copyfile(self.settings.projection, target / "projection.safetensors")
        return target

    def _train_step(self) -> dict[str, Any]:
        started = time.monotonic()
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, tokens = self._losses()
        loss = sum(losses.values(), start=torch.zeros((), device=self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.settings.max_gradient_norm
        )
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {self.step}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        return {
            "step": self.step + 1,
            "loss": loss.item(),
            **{name: value.item() for name, value in losses.items()},
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "tokens_per_second": round(tokens / seconds),
        }

    def _learning_rate(self) -> float:
        s = self.settings
        warm = min(1.0, (self.step + 1) / max(1, s.warmup_steps))
        falling = max(1.0, s.decay * s.steps)
        return s.learning_rate * min(warm, (s.steps - self.step) / falling)

    # The losses of one step

    def _losses(self) -> tuple[dict[str, Tensor], int]:
        s, corpus = self.settings, self.corpus
        examples = [
            corpus.examples[row]
            for row in (self._pairs.draw(self.step, s.pairs_per_step) if s.data else ())
        ]
        rng = np.random.default_rng([s.seed, 3, self.step])
        negatives, owners = [], []
        for owner, example in enumerate(examples):
            count = min(len(example.negatives), s.max_negatives)
            for row in rng.permutation(len(example.negatives))[:count]:
                negatives.append((example.negatives[row], example.passage_instruction))
                owners.append(owner)
        prompts: list[Prompt] = [(e.query, e.query_instruction) for e in examples]
        prompts += [(e.positive, e.passage_instruction) for e in examples]
        prompts += negatives
        drawn = self._texts.draw(self.step, s.texts_per_step) if s.texts_per_step else []
        prompts += [(corpus.texts[corpus.drawn[row]], "") for row in drawn]

        vectors, tokens = self.embed(prompts)
        losses: dict[str, Tensor] = {}
        count = len(examples)
        if count:
            positives = [e.positive for e in examples]
            same = np.array([[a == b for b in positives] for a in positives])
            same_negatives = np.array(
                [[a == text for text, _ in negatives] for a in positives], dtype=bool
            ).reshape(count, len(negatives))
            losses["contrastive"] = s.contrastive_weight * contrastive_loss(
                vectors[:count],
                vectors[count : 2 * count],
                vectors[2 * count : 2 * count + len(negatives)],
                torch.tensor(owners, dtype=torch.long, device=self.device),
                temperature=s.temperature,
                in_batch=s.in_batch_negatives,
                same=torch.from_numpy(same).to(self.device),
                same_negatives=torch.from_numpy(same_negatives).to(self.device),
            )
        if s.texts:
            # Not only the drawn texts: whatever else in the batch has a teacher's vector, too.
            known = [
                (place, corpus.places[text])
                for place, (text, _) in enumerate(prompts)
                if text in corpus.places
            ]
            if known:
                places, targets = zip(*known, strict=True)
                losses["distillation"] = s.distillation_weight * distillation_loss(
                    vectors[list(places)],
                    torch.from_numpy(corpus.targets[list(targets)]).to(self.device),
                )
        assert losses, "a step without a loss"
        return losses, tokens

    def embed(self, prompts: Sequence[Prompt]) -> tuple[Tensor, int]:
        """Vectors [N, D] of the prompts, in their order, and the number of tokens."""
        encodings: list[Encoding] = []
        for text, instruction in prompts:
            room = self.settings.max_tokens + self.tokenizer.pool_start(instruction)
            encodings.append(
                self.tokenizer.encode(text, instruction, max_tokens=room, truncate=Truncation.END)
            )
        # Sorted, so that sequences of similar length stand side by side (see attention.py).
        order = sorted(range(len(encodings)), key=lambda i: (-len(encodings[i]), i))
        batch = pack([encodings[i] for i in order], self.device)
        with (
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
            sdpa_kernel(SDPBackend.MATH),  # for the pooler; the fused one is slow backwards
        ):
            vectors = self.model(batch, self.attend)
        places = torch.empty(len(order), dtype=torch.long)
        places[torch.tensor(order)] = torch.arange(len(order))
        return vectors.index_select(0, places.to(self.device)), batch.num_tokens

    # Validation

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On the held-out rows: cosine to the teacher; MRR of positives among one another."""
        corpus = self.corpus
        scores: dict[str, float] = {}
        if rows := corpus.held_out_texts:
            vectors = self._embed_all([(corpus.texts[row], "") for row in rows])
            targets = torch.from_numpy(corpus.targets[rows])
            scores["validation_cosine"] = round((vectors * targets).sum(-1).mean().item(), 5)
        if corpus.held_out:
            queries = self._embed_all([(e.query, e.query_instruction) for e in corpus.held_out])
            found = self._embed_all([(e.positive, e.passage_instruction) for e in corpus.held_out])
            similar = queries @ found.T
            ranks = (similar > similar.diagonal()[:, None]).sum(-1) + 1
            scores["validation_mrr"] = round((1 / ranks).mean().item(), 5)
        return scores

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], instruction: str) -> NDArray[np.float32]:
        """An `evaluation.Embedder` of the weights as they are now."""
        vectors = self._embed_all([(text, instruction) for text in texts])
        return vectors.numpy()

    def _embed_all(self, prompts: Sequence[Prompt]) -> Tensor:
        parts = [self.embed(prompts[i : i + 128])[0] for i in range(0, len(prompts), 128)]
        return torch.cat(parts).cpu()

    # States

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        mine = json.dumps(self.settings.to_json(), indent=1)
        for part in (self.folder / "state").glob(".part-*"):  # of a run that was killed
            shutil.rmtree(part)
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_text(mine + "\n", encoding="utf-8")
            part.replace(path)
        elif json.loads(path.read_text(encoding="utf-8")) != json.loads(mine):
            raise TrainingSettingsError(
                f"{self.folder} holds a run of other settings; choose another folder"
            )

    def save(self) -> Path:
        """Write the state of this step, then forget all but the last ones."""
        states = self.folder / "state"
        target = states / f"step-{self.step:07}"
        part = states / f".part-{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(self.model.state_dict(), str(part / "model.safetensors"))
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        moments["torch_rng"] = torch.get_rng_state()
        save_file(moments, str(part / "optimizer.safetensors"))
        (part / "state.json").write_text(json.dumps({"step": self.step}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in sorted(states.glob("step-*"))[:-_KEPT_STATES]:
            shutil.rmtree(old)
        return target

    def _resume(self) -> None:
        states = sorted((self.folder / "state").glob("step-*"))
        if not states:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return
        state = states[-1]
        self.model.load_state_dict(load_file(str(state / "model.safetensors")))
        moments = load_file(str(state / "optimizer.safetensors"))
        torch.set_rng_state(moments.pop("torch_rng"))
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                key: moments[f"{name}.{key}"].to(parameter.device)  # fused Adam: `step` too
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(json.loads((state / "state.json").read_text())["step"])
        self._forget_metrics_after(self.step)
        logger.info("going on from step %d", self.step)

    def _forget_metrics_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # A killed run may leave half a line behind.
        whole = [line for line in lines if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))

    def _log(self, metrics: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def _parameter_groups(model: torch.nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, embeddings and latents do not."""
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.dim() < 2 or name.endswith(("embed_tokens.weight", "latents"))
        (free if plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": decay},
        {"params": free, "weight_decay": 0.0},
    ]


def _autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 where it is fast: on GPUs and on processors with AMX."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or host.has_amx() else "float32"
    return torch.bfloat16 if name == "bfloat16" else None
