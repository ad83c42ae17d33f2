"""`nv-embed verify` passes on the golden checkpoint, and fails when something is wrong."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from model import fused
from model.attention.cpu import sdpa_by_length
from model.batch import Encoding
from model.card import read_card
from model.errors import UnsupportedError
from model.packing import Segments
from model.tokenizer import NVEmbedTokenizer, Truncation
from model.tokenizer_file import read_tokenizer
from model.verify import authors, command, parity
from model.verify.authors import check_example_ids
from model.verify.bench import Bench
from model.verify.outcome import Check
from model.verify.referee import Referee
from model.verify.structure import check_mask
from model.verify.subject import Measured, Subject, load, sample_encodings
from tests.checkpoints import GOLDEN_CASES, golden_cases, tokenizer_of
from tests.model import fused_stand_in
from tests.model.test_byte_level import byte_level_tokenizer
from tests.siblings import SIBLINGS, write_sibling

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module", autouse=True)
def vocabularies_are_parsed_once_here_too() -> Iterator[None]:
    once = SimpleNamespace(from_file=lambda path: tokenizer_of(Path(path).read_text("utf-8")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authors, "Tokenizer", once)
        yield


CARD = """---
license: cc-by-nc-4.0
---
## Introduction
```bash
pip install torch==2.2.0
```
#### Usage
```python
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, AutoModel

# Each query needs to be accompanied by an corresponding instruction describing the task.
task_name_to_instruct = {{
    "example": "Given a question, retrieve passages that answer the question",}}

query_prefix = "Instruct: "+task_name_to_instruct["example"]+"\\nQuery: "
queries = [
    'are judo throws allowed in wrestling?',
    'how to become a radiology technician in michigan?'
    ]

# No instruction needed for retrieval passages
passage_prefix = ""
passages = {passages}

# load model with tokenizer
model = AutoModel.from_pretrained('nvidia/NV-Embed-v2', trust_remote_code=True)
raise SystemExit("this code must not run")

# get the embeddings
max_length = 32768
query_embeddings = model.encode(queries, instruction=query_prefix, max_length=max_length)
scores = (query_embeddings @ passage_embeddings.T) * 100
print(scores.tolist())
# {scores}
```
"""
"""The form of the official card."""


def golden_card() -> str:
    """A card whose scores come from the authors' vectors."""
    cases = {case["name"]: case for case in golden_cases()}
    queries, passages = cases["readme queries"], cases["passages"]
    scores = np.array(queries["embeddings"]) @ np.array(passages["embeddings"]).T * 100
    return CARD.format(passages=passages["texts"], scores=scores.tolist())


@pytest.fixture
def folder(tmp_path: Path, golden_checkpoint: Path) -> Path:
    """The golden checkpoint with its card and the authors' outputs beside it."""
    folder = Path(shutil.copytree(golden_checkpoint, tmp_path / "checkpoint"))
    (folder / "README.md").write_text(golden_card())
    shutil.copy(GOLDEN_CASES, folder / "golden.json")
    return folder


def arguments(folder: Path, **changes: object) -> argparse.Namespace:
    options: dict[str, object] = {
        "model": str(folder),
        "revision": None,
        "family": "auto",
        "offline": True,
        "device": "cpu",
        "dtype": "float32",
        "quantization": "none",
        "cpu_products": "auto",
        "fused_kernels": "plain",
        "attention": "auto",
        "threads": None,
        "golden": None,
    }
    return argparse.Namespace(**options | changes)


def subject(folder: Path, **changes: object) -> Subject:
    return replace(command.open_subject(arguments(folder, **changes)), measure_seconds=0.0)


def outcome(subject: Subject) -> dict[str, Check]:
    return {check.name: check for check in command.run_checks(subject, Measured())}


def failures(subject: Subject) -> set[str]:
    return {name for name, check in outcome(subject).items() if check.status == "failed"}


def test_passes_on_the_golden_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.verify(subject(folder))
    lines = capsys.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(lines[-1])
    skipped = [check["name"] for check in report["checks"] if check["status"] == "skipped"]
    assert lines[-2] == f"passed ({len(skipped)} skipped)"
    assert report["skipped"] == len(skipped) > 0
    assert report["passed"] is True
    assert (report["device"], report["dtype"], report["attention"]) == ("cpu", "float32", "sdpa")
    assert report["tokens_per_s"] > 0
    assert report["peak_memory_bytes"] > 0
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    checks = {check["name"]: check for check in report["checks"]}
    assert {name for name, check in checks.items() if check["status"] == "skipped"} == {
        "CUDA graphs and eager",
        "float16 and float32",
        "float8 and float32",
    }
    assert checks["golden ids"]["got"] == 18
    card = checks["model card's example"]
    assert np.abs(np.array(card["got"]) - np.array(card["expected"])).max() < 0.01
    for expected, got in zip(np.ravel(card["expected"]), np.ravel(card["got"]), strict=True):
        assert f"{expected}" in "\n".join(lines)
        assert f"{got}" in "\n".join(lines)


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_fused_kernels_are_held_against_the_plain_ones(
    folder: Path, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(kernel: str, programs: int, *args: Any, **constants: Any) -> None:
        fused_stand_in.launch(kernel, programs, *args, **constants)
        if wrong and kernel == "silu_up":
            args[1].mul_(1.01)

    monkeypatch.setitem(fused.LAUNCHES, "triton", (lambda: launch, lambda device: None))
    checks = outcome(subject(folder, fused_kernels="triton"))
    expected = "failed" if wrong else "passed"
    assert checks["triton and plain kernels"].status == expected
    assert checks["golden vectors"].status == "passed", "the plain ones are the referee"
    if not wrong:
        assert "failed" not in {check.status for check in checks.values()}


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_passes_in_low_precision(folder: Path, options: dict[str, str]) -> None:
    assert failures(subject(folder, **options)) == set()


@pytest.mark.parametrize(
    "name",
    [
        "embedding_model.layers.1.self_attn.k_proj.weight",
        "embedding_model.norm.weight",
        "latent_attention_model.latents",
        "latent_attention_model.cross_attend_blocks.1.fn.net.2.bias",
    ],
)
def test_fails_when_one_tensor_is_changed(folder: Path, name: str) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = np.roll(tensors[name], 1, axis=-1)
            save_file(tensors, shard)
    assert failures(subject(folder)) == {"model card's example", "golden vectors"}


def test_fails_when_a_tensor_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        tensors.pop("embedding_model.norm.weight", None)
        save_file(tensors, shard)
    assert command.run(arguments(folder)) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not report["passed"]
    assert "missing: embedding_model.norm.weight" in report["checks"][0]["note"]


def causal(
    q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, **_: object
) -> Tensor:
    """A kernel with Mistral's own mask: row i of the queries is the i-th last of the keys."""
    outputs = []
    parts = zip(
        torch.split(q, list(queries.lengths)),
        torch.split(k, list(keys.lengths)),
        torch.split(v, list(keys.lengths)),
        strict=True,
    )
    for q_part, k_part, v_part in parts:
        mask = torch.ones(len(q_part), len(k_part), dtype=torch.bool)
        out = F.scaled_dot_product_attention(
            q_part.transpose(0, 1)[None],
            k_part.transpose(0, 1)[None],
            v_part.transpose(0, 1)[None],
            attn_mask=mask.tril(len(k_part) - len(q_part)),
            enable_gqa=True,
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("with_values", [True, False], ids=["with values", "structure alone"])
def test_fails_when_the_mask_is_causal(folder: Path, with_values: bool) -> None:
    structural = {"attention sees ahead", "backbone's first layers", "padded and causal",
                  "sdpa and causal"}  # fmt: skip
    if not with_values:
        (folder / "golden.json").unlink()
        (folder / "README.md").unlink()
    wrong = replace(subject(folder), kernel=lambda dtype: ("causal", causal))
    found = failures(wrong)
    assert structural <= found
    assert found - structural == (
        {"model card's example", "golden vectors"} if with_values else set()
    )


class WithoutEos(NVEmbedTokenizer):
    """Forgets the last id."""

    def encode(
        self,
        text: str,
        instruction: str = "",
        *,
        max_tokens: int,
        truncate: Truncation = Truncation.NONE,
    ) -> Encoding:
        whole = super().encode(text, instruction, max_tokens=max_tokens, truncate=truncate)
        return Encoding(whole.ids[:-1], whole.pool_start)


def test_fails_when_eos_is_missing(folder: Path) -> None:
    wrong = replace(subject(folder), tokenizer=WithoutEos.from_dir(folder))
    assert failures(wrong) >= {
        "token ids", "BOS and EOS", "golden ids", "golden vectors", "model card's example",
    }  # fmt: skip
    (folder / "golden.json").unlink()
    (folder / "README.md").unlink()
    assert failures(replace(wrong, golden=None)) == {"token ids", "BOS and EOS"}


def test_a_tokenizer_that_lowers_is_judged_by_the_rest_of_it(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, raw["normalizer"]],
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    check = check_example_ids(subject(folder))
    assert (check.status, check.got) == ("passed", check.expected)
    assert "without its small letters" in check.note
    vocabulary = raw["model"]["vocab"]
    vocabulary["▁the"], vocabulary["▁of"] = vocabulary["▁of"], vocabulary["▁the"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert check_example_ids(subject(folder)).status == "failed"


def test_says_what_it_skips(golden_checkpoint: Path) -> None:
    checks = outcome(subject(golden_checkpoint))
    skipped = {name: check.note for name, check in checks.items() if check.status == "skipped"}
    assert skipped == {
        "CUDA graphs and eager": "CUDA graphs need a GPU, not cpu",
        "golden ids": "the folder holds no golden.json, and no --golden was given",
        "golden vectors": "the folder holds no golden.json, and no --golden was given",
        "model card's example": "the folder holds no model card (README.md)",
        "float16 and float32": "processors compute float16 slowly: it is for GPUs",
        "float8 and float32": "float8 needs a GPU of compute capability 8.9 (Ada, Hopper) or "
        "later, and bfloat16; this is bfloat16 on cpu",
    }
    assert all(check.status != "failed" for check in checks.values())


def test_without_room_for_float32_it_goes_layer_by_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command.no_room

    def no_room(subject: Subject, dtype: torch.dtype, quantization: str) -> str | None:
        return "no room" if dtype == torch.float32 else whole(subject, dtype, quantization)

    monkeypatch.setattr(command, "no_room", no_room)
    checks = outcome(subject(folder, dtype="bfloat16"))
    assert (checks["golden vectors"].status, checks["golden vectors"].note) == (
        "skipped",
        "they are float32: no room",
    )
    for name in ("bfloat16 and float32", "int8 and float32", "int8-dynamic and float32"):
        assert checks[name].status == "passed"
        assert 0.99 < checks[name].got < 1.0


def test_not_a_number_fails_and_is_still_json(folder: Path) -> None:
    def broken(
        q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, **_: object
    ) -> Tensor:
        return sdpa_by_length(q, k, v, queries, keys) * float("nan")

    wrong = replace(subject(folder), kernel=lambda dtype: ("broken", broken))
    checks = outcome(wrong)
    assert checks["golden vectors"].status == checks["backbone's first layers"].status == "failed"
    json.dumps([check.got for check in checks.values()], allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/folder"}, "neither a folder nor"),
        ({"golden": Path("/no/golden.json")}, "--golden: there is no file"),
        ({"device": "tpu"}, "unknown device|not supported"),
        ({"attention": "varlen"}, "runs on CUDA only|needs float16"),
        ({"quantization": "int4"}, "known: none, int8"),
        ({"dtype": "float8"}, "unknown dtype"),
    ],
)
def test_what_cannot_run_exits_2_with_a_message(
    golden_checkpoint: Path,
    changes: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.run(arguments(golden_checkpoint, **changes)) == 2
    assert re.search(message, capsys.readouterr().err)


# -- the model card ---------------------------------------------------------------------------


def test_the_card_is_read_not_run() -> None:
    example = read_card(golden_card())
    assert example is not None
    assert example.prefix == golden_cases()[0]["instruction"]
    assert example.queries == golden_cases()[0]["texts"]
    assert example.passages == golden_cases()[1]["texts"]
    assert np.shape(example.scores) == (2, 2)


def test_the_published_way_of_writing_scores() -> None:
    card = CARD.format(
        passages=["a", "b"],
        scores="[[87.42693328857422, 0.46283677220344543], [0.965264618396759, 86.03721618652344]]",
    )
    example = read_card(card)
    assert example is not None
    assert example.scores == [
        [87.42693328857422, 0.46283677220344543],
        [0.965264618396759, 86.03721618652344],
    ]
    without_space = read_card(card.replace("# [[", "#[["))
    assert without_space == example


@pytest.mark.parametrize(
    "card",
    ["", "# no code", "```python\nqueries = (\n```", "```python\nqueries = ['x']\n```",
     "```python\nquery_prefix = ''\nqueries = load()\npassages = ['x']\n```"],
)  # fmt: skip
def test_a_card_without_an_example(card: str) -> None:
    assert read_card(card) is None


def test_known_scores_stand_in_for_a_card_without_numbers(folder: Path) -> None:
    (folder / "README.md").write_text(CARD.format(passages=["a", "b"], scores=""))
    unnamed = subject(folder)
    assert outcome(unnamed)["model card's example"].note == "the model card prints no scores"
    official = replace(unnamed, source=replace(unnamed.source, model_id="nvidia/NV-Embed-v2"))
    check = outcome(official)["model card's example"]
    assert check.expected == [[87.4269, 0.4628], [0.9653, 86.0372]]
    assert check.status == "failed"  # random weights


# -- the other families -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SIBLINGS)
def sibling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sibling(tmp_path_factory.mktemp("siblings") / request.param, request.param)


def test_passes_on_each_family(sibling: Path) -> None:
    checks = outcome(subject(sibling))
    skipped = {name for name, check in checks.items() if check.status == "skipped"}
    assert {check.status for check in checks.values()} == {"passed", "skipped"}
    assert skipped == {
        *("golden ids", "golden vectors", "model card's example", "CUDA graphs and eager"),
        *("float16 and float32", "float8 and float32"),
    }


def test_the_referee_gives_the_vectors_that_serve(sibling: Path) -> None:
    judged = subject(sibling)
    referee = Referee(sibling, judged.config, torch.device("cpu"))
    encodings = sample_encodings(judged)
    served = load(judged, torch.float32, "none").embed(encodings)
    assert np.abs(referee.embed(encodings) - served).max() < 1e-5


def changed_family(judged: Subject, **changes: Any) -> Subject:
    """As if the family's row said so."""
    family = replace(judged.config.family, **changes)
    raw = read_tokenizer(judged.source.path, byte_level=family.byte_level)
    tokenizer = NVEmbedTokenizer(raw, family)
    return replace(judged, config=replace(judged.config, family=family), tokenizer=tokenizer)


def test_fails_when_a_family_has_another_mask(sibling: Path) -> None:
    judged = subject(sibling)
    causal = judged.config.family.mask == "causal"
    found = failures(changed_family(judged, mask="full" if causal else "causal"))
    look = "attention sees nothing ahead" if causal else "attention sees ahead"
    assert {look, "backbone's first layers"} <= found


def test_fails_when_a_family_has_another_window(sibling: Path) -> None:
    judged = subject(sibling)
    attend = judged.kernel(torch.float32)[1]

    def without_window(*args: Any, **options: Any) -> Tensor:
        return attend(*args, **options | {"window": None})

    found = failures(replace(judged, kernel=lambda dtype: ("no window", without_window)))
    assert found == ({"backbone's first layers"} if judged.config.causal else set())


def test_fails_when_a_family_pools_otherwise(sibling: Path) -> None:
    judged = subject(sibling)
    last = judged.config.family.pooler == "last"
    found = failures(changed_family(judged, pooler="mean" if last else "last"))
    assert "pooler" in found
    if judged.config.family.left_out == "prefix":
        assert "token ids" in failures(changed_family(judged, left_out="nothing"))


def test_fails_when_a_family_has_another_eos(sibling: Path) -> None:
    judged = subject(sibling)
    has = judged.config.family.keeps_eos is not None
    for wrong in {None, False, True} - {judged.config.family.keeps_eos}:
        found = failures(changed_family(judged, keeps_eos=wrong))
        assert found >= {"BOS and EOS"} | ({"token ids"} if has != (wrong is not None) else set())


def test_fails_when_a_family_has_another_template(sibling: Path) -> None:
    judged = subject(sibling)
    family = judged.config.family
    if family.template is None:
        wrong = changed_family(judged, query="query:")
    else:
        wrong = changed_family(judged, template=family.template.replace("\n", " "))
    assert failures(wrong) == {"token ids"}
    if family.passage:
        assert failures(changed_family(judged, passage="")) == {"token ids"}


@pytest.mark.parametrize("name", ["nemotron-3-embed", "bidirectional-mean"])
def test_fails_on_bytes_when_a_template_is_changed(name: str, tmp_path: Path) -> None:
    """The ids of another vocabulary are the library's, with the family's prefix in front."""
    folder = write_sibling(tmp_path / name, name)
    raw = Tokenizer.from_str(byte_level_tokenizer().to_str())
    raw.enable_padding(length=64, pad_id=2, pad_token="</s>")  # as many saved ones have
    raw.enable_truncation(5)
    raw.save(str(folder / "tokenizer.json"))
    judged = subject(folder)
    assert check_example_ids(judged).status == "passed"
    for change in ({"query": "wrong: "}, {"passage": ""}, {"left_out": "prefix"}):
        assert check_example_ids(changed_family(judged, **change)).status == "failed", change


@pytest.mark.parametrize("name", ["passage", "document"])
@pytest.mark.parametrize("prefix", ["doc: ", ""])
def test_prefixes_of_the_folder_are_what_is_compared(
    name: str, prefix: str, tmp_path: Path
) -> None:
    folder = write_sibling(tmp_path / "mean", "bidirectional-mean")
    prompts = {"query": "ask: ", name: prefix}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    judged = subject(folder)
    check = check_example_ids(judged)
    assert (check.status, check.got) == ("passed", 2)
    for change in ({"query": "query: "}, {"passage": "passage: "}):
        assert check_example_ids(changed_family(judged, **change)).status == "failed", change


def test_the_mask_of_a_small_vocabulary(tmp_path: Path) -> None:
    folder = write_sibling(tmp_path / "small", "nemotron-3-embed", {"vocab_size": 800})
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    judged = subject(folder)
    working = load(judged, torch.float32, "none")
    assert check_mask(judged, working).status == "passed"
    causal = replace(
        working, attend=lambda *args, **o: working.attend(*args, **o | {"causal": True})
    )
    assert check_mask(judged, causal).status == "failed"


def test_without_transformers_own_layers_it_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with transformers 4, which has no Ministral3."""
    folder = write_sibling(tmp_path / "nemotron", "nemotron-3-embed")
    monkeypatch.setattr("transformers.Ministral3Model", None)
    why = r"transformers 5.* has no Ministral3Model to compare with: it came with 5.0"
    checks = outcome(subject(folder))
    assert {check.status for check in checks.values()} == {"passed", "skipped"}
    assert re.fullmatch(why, checks["backbone's first layers"].note)
    with pytest.raises(UnsupportedError, match=why):
        Referee(folder, subject(folder).config, torch.device("cpu")).embed(
            sample_encodings(subject(folder))
        )


def test_gpu_checks_steps_skip_what_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as if a step had failed."""
    folder = write_sibling(tmp_path / "nemotron", "nemotron-3-embed")
    monkeypatch.setattr("transformers.Ministral3Model", None)
    job = {"model_id": "x", "path": str(folder), "device": "cpu", "attention": "auto"}
    bench = Bench(job | {"base": "bfloat16", "work": str(tmp_path)}, 0.0)
    steps: list[Callable[[], object]] = [
        lambda: parity.referee(bench),
        lambda: parity.cosine(bench, "bfloat16"),
    ]
    for step in steps:
        with pytest.raises(UnsupportedError, match="has no Ministral3Model"):
            step()


def test_without_room_nor_layers_of_transformers_nothing_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sibling(tmp_path / "nemotron", "nemotron-3-embed")
    monkeypatch.setattr("transformers.Ministral3Model", None)
    whole = command.no_room
    monkeypatch.setattr(
        command,
        "no_room",
        lambda judged, dtype, kind: "no" if dtype == torch.float32 else whole(judged, dtype, kind),
    )
    checks = outcome(subject(folder, dtype="bfloat16"))
    assert checks["float32 layer by layer"].status == "skipped"
    assert checks["int8 and float32"].note == "there are no float32 vectors to compare with"
    assert "failed" not in {check.status for check in checks.values()}


def test_the_card_of_e5_mistral_and_its_kin_is_read() -> None:
    """The form of theirs, whose queries are made by a function."""
    card = """```python
def get_detailed_instruct(task_description: str, query: str) -> str:
    return f'Instruct: {task_description}\\nQuery: {query}'

task = 'Given a web search query, retrieve relevant passages that answer the query'
queries = [
    get_detailed_instruct(task, 'how much protein should a female eat'),
    get_detailed_instruct(task, load()),
]
```
```python
task = 'Given a web search query, retrieve relevant passages that answer the query'
queries = [get_detailed_instruct(task, 'a'), get_detailed_instruct(task, 'b')]
# No need to add instruction for retrieval documents
passages = ["c", "d"]
print(scores.tolist())
# [[86.7, 36.6], [35.0, 82.1]]
```"""
    example = read_card(card)
    assert example is not None
    task = "Given a web search query, retrieve relevant passages that answer the query"
    assert example.queries == [f"Instruct: {task}\nQuery: {text}" for text in "ab"]
    assert (example.prefix, example.passages) == ("", ["c", "d"])
    assert example.scores == [[86.7, 36.6], [35.0, 82.1]]
