"""A family that the product does not have, for tests: a causal mask, the last row, plain names.

Its row is all that it takes. `python -m tests.toy_family serve …` is `nv-embed` with the row, and
`--runner tests.toy_family:runner` the ordinary runner with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from model import families
from model.batch import RunnerOptions
from model.config import ModelConfig
from model.families import Family
from model.weights.names import expected_shapes
from tests.checkpoints import official_tokenizer

if TYPE_CHECKING:
    from model.runner import ModelRunner

TOY = Family(
    name="toy",
    model_type="toy-last",
    mask="causal",
    pooler="last",
    left_out="instruction",
    keeps_eos=True,
    template="Task: {task}\nText: ",
)
CONFIG: dict[str, Any] = {
    "model_type": TOY.model_type,
    "vocab_size": 32000,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "sliding_window": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


def register() -> None:
    if TOY not in families.FAMILIES:
        families.FAMILIES.append(TOY)


def write(folder: Path) -> Path:
    """A checkpoint of random weights, of a size that makes attention matter."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(5)
    tensors = {}
    for name, shape in expected_shapes(ModelConfig.from_dict(CONFIG)).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        tensors[name] = 1 + 0.3 * values if "norm" in name else 0.25 * values
    save_file(tensors, folder / "model.safetensors")
    official_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def runner(options: RunnerOptions) -> ModelRunner:
    """The ordinary one, in a process that knows the row."""
    from model.runner import ModelRunner

    register()
    return ModelRunner(options)


def main() -> int:
    from server import cli

    register()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
