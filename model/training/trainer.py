"""The training loop: batches, steps, validation.

A step's data are a function of the settings and the step's number alone, so a run that was
killed goes on from its last state (`states`) as if nothing had happened: the same weights, bit
for bit (same machine, same number of threads).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import tasks as named_tasks
from model.batch import Encoding
from model.config import ModelConfig
from model.errors import ModelError, PromptError
from model.families import Side
from model.packing import pack, segments_of
from model.platform import resources
from model.progress import Progress
from model.runner import resolve_device
from model.tokenizer import NVEmbedTokenizer, Truncation
from model.tokenizer_file import read_tokenizer
from model.training import gradient_cache
from model.training.adapters import add_lora
from model.training.attention import grouped_products
from model.training.case import recased
from model.training.compiled import compile_parts
from model.training.corpus import Shuffle, load_corpus
from model.training.export import export, export_like, write_papers
from model.training.metrics import spearman
from model.training.mistral_import import is_plain_mistral, load_mistral, mistral_config
from model.training.network import TrainedNVEmbed, load_trained
from model.training.objective import Draw, Objective, Prompted, passage_prompt, query_prompt
from model.training.optimizers import optimizer_of
from model.training.settings import TrainingSettings, TrainingSettingsError
from model.training.states import RunFolder, trained_parameters
from model.training.teacher import Projection
from model.training.words import WordTargets, of_whole_texts, word_loss

logger = logging.getLogger("nv_embed.training")
TASKS = sorted({task.query for task in named_tasks.TASKS.values() if task.query})


class DivergedError(ModelError):
    """The loss has left the finite numbers."""


class Trainer:
    """One run in one folder: `run()` starts it, or goes on where it stopped.

    The folder gets what `states` keeps there and, at the end, the exported checkpoint in
    `checkpoint/`.
    """

    def __init__(self, settings: TrainingSettings, folder: Path, *, device: str = "auto") -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.folder = settings, folder
        self.run_folder = RunFolder(folder)
        self.device = resolve_device(device)
        self.autocast = _autocast_dtype(settings.dtype, self.device)
        self.start = Path(settings.model)
        self.corpus = load_corpus(settings)
        self.objective = Objective(settings, self.corpus, self.device)
        self.anew = is_plain_mistral(self.start, settings.family)
        self.model = self._load()
        self.model.config = config = self._with_widths(self.model.config)
        self.tokenizer = NVEmbedTokenizer.from_dir(self.start, config=config)
        self.family = config.family
        self._refuse_tasks_without_a_place()
        width = self.corpus.targets.shape[1]
        if settings.texts and width != config.hidden_size:
            raise TrainingSettingsError(
                f"the vectors to learn from have {width} numbers, and {self.start} "
                f"{config.hidden_size}: a projection takes the one to the other"
            )
        self.optimizer = optimizer_of(
            self.model, settings.optimizer, settings.learning_rate, settings.weight_decay
        )
        self.words = None
        if settings.words:
            pieces = read_tokenizer(self.start, byte_level=self.family.byte_level).get_vocab()
            projection = Projection.load(Path(str(settings.projection)))
            self.words = WordTargets(Path(settings.words), projection, pieces)
        self.step = 0
        self._pairs = Shuffle(len(self.corpus.examples) or 1, settings.seed, 1)
        self._texts = Shuffle(len(self.corpus.drawn) or 1, settings.seed, 2)
        self._scored = Shuffle(len(self.corpus.scored) or 1, settings.seed, 5)
        torch.manual_seed(settings.seed)

    def _load(self) -> TrainedNVEmbed:
        """The module to train. Raises CheckpointError, UnsupportedError, TrainingSettingsError."""
        s = self.settings
        dtype = self.autocast if s.lora_rank and self.autocast else torch.float32
        sizes = {
            name: getattr(s, name) for name in ("num_latents", "num_cross_heads", "cross_dim_head")
        }
        if self.anew:
            if not s.servable:
                raise TrainingSettingsError("an ablation starts from an NV-Embed checkpoint")
            if s.family == "auto":
                logger.warning(
                    "nothing in %s tells its family: it becomes an NV-Embed with a new pooler "
                    "(the setting `family` names another)",
                    self.start,
                )
            config = mistral_config(self.start, **sizes)
            model = load_mistral(
                self.start, config, seed=s.seed, device=self.device, projections=dtype
            )
        elif given := [name for name, size in sizes.items() if size]:
            raise TrainingSettingsError(
                f"{', '.join(given)}: sizes of a new pooler, and {s.model} keeps its own"
            )
        else:
            model = load_trained(
                self.start,
                device=self.device,
                projections=dtype,
                family=s.family,
                pooling=s.pooling,
                causal=s.causal,
            )
        if s.lora_rank:
            torch.manual_seed(s.seed)
            add_lora(model, rank=s.lora_rank, alpha=s.lora_alpha, dropout=s.lora_dropout)
        if s.compile:
            compile_parts(model)
        return model

    def _with_widths(self, config: ModelConfig) -> ModelConfig:
        """The start's, with the dimensions of this run in place of its own."""
        widths = sorted({*(self.settings.matryoshka_dimensions or ())}, reverse=True)
        if widths and widths[0] >= config.hidden_size:
            raise TrainingSettingsError(
                f"matryoshka_dimensions has {widths[0]}, and {self.start} has no more than "
                f"{config.hidden_size} dimensions"
            )
        return replace(config, matryoshka_dimensions=tuple(widths))

    def _refuse_tasks_without_a_place(self) -> None:
        """Before the first step: some families take a side and no description."""
        corpus = self.corpus
        tasks = {example.task for example in (*corpus.examples, *corpus.held_out)}
        if self.settings.instructed:
            tasks |= {*TASKS}
        for task in tasks | {pair.task for pair in (*corpus.scored, *corpus.held_out_scored)}:
            try:
                self.family.prompt("query", task)
            except PromptError:
                raise TrainingSettingsError(
                    f"{self.start} is a {self.family.name} model, whose queries take no task: "
                    f"leave `task` out of the data, and `instructed` (a task was {task[:80]!r})"
                ) from None

    # The run

    def run(self, *, stop_after: int | None = None, progress: bool | None = None) -> Path | None:
        """Train to the end; returns the exported checkpoint (None of an ablation).

        stop_after: stop at this step without exporting, and return None (for tests).
        Raises TrainingSettingsError when the folder holds a run of other settings, LockedError when
        another process trains there.
        """
        with self.run_folder.locked():
            return self._run(stop_after, progress)

    def _run(self, stop_after: int | None, progress: bool | None) -> Path | None:
        self.run_folder.claim(self.settings)
        self.step = self.run_folder.resume(self.model, self.optimizer)
        steps = self.settings.steps
        with Progress(steps, "Training", "steps", done=self.step, shown=progress) as bar:
            while self.step < steps:
                metrics = self._train_step()
                self.step += 1
                last = self.step == steps
                if last or self.step % self.settings.validate_every == 0:
                    metrics |= self.validate()
                self.run_folder.log(metrics)
                bar.advance(figures=f"loss {metrics['loss']:.4f}")
                if last or self.step % self.settings.save_every == 0:
                    self.run_folder.save(self.step, self.model, self.optimizer)
                if stop_after == self.step:
                    return None
        if not self.settings.servable:
            return None
        target, name = self.folder / "checkpoint", self.settings.name
        dtype = getattr(torch, self.settings.export_dtype)
        if self.anew:
            export(self.model, target, self.start / "tokenizer.json", dtype=dtype, name=name)
        else:
            export_like(self.start, self.model, target, dtype=dtype, name=name)
        kind = f"LoRA of rank {r}, merged" if (r := self.settings.lora_rank) else "all weights"
        s = self.settings
        learnt = f"stage {s.stage}" if s.data else "distillation" if s.texts_per_step else "scores"
        write_papers(self.start, target, f"{steps} steps of `nv-embed train` ({learnt}; {kind}).")
        return target

    def _train_step(self) -> dict[str, Any]:
        started = time.monotonic()
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, tokens = self.backward(self.draw())
        norm = torch.nn.utils.clip_grad_norm_(
            trained_parameters(self.model).values(), self.settings.max_gradient_norm
        )
        if not torch.isfinite(norm):
            raise DivergedError(
                f"the gradient is not finite at step {self.step}: a lower learning_rate, a longer "
                "warmup or float32 may help; the last state is kept"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        return {
            "step": self.step + 1,
            "loss": sum(self.objective.weight(name) * value for name, value in losses.items()),
            **losses,
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "tokens_per_second": round(tokens / seconds),
        }

    def _learning_rate(self) -> float:
        s = self.settings
        warm = min(1.0, (self.step + 1) / max(1, s.warmup_steps))
        falling = max(1.0, s.decay * s.steps)
        return s.learning_rate * min(warm, (s.steps - self.step) / falling)

    def backward(self, draw: Draw) -> tuple[dict[str, float], int]:
        """Add the gradient of the weighted losses of `draw` to the parameters.

        Returns the losses, unweighted, and the number of tokens.
        """
        encodings, places = self._sorted(self._as_read(draw.prompted(self.family)))
        lengths = [len(encoding) for encoding in encodings]
        if self.words is not None:
            return self._backward_with_words(draw, encodings, places), sum(lengths)
        parts = gradient_cache.split_by_tokens(lengths, self.settings.tokens_per_pass)
        losses: dict[str, Tensor] = {}

        def loss_of(vectors: Tensor) -> Tensor:
            losses.update(self.objective.losses(draw, vectors.index_select(0, places)))
            return self._weighted(losses)

        gradient_cache.backward([encodings[part] for part in parts], self._forward, loss_of)
        return {name: value.item() for name, value in losses.items()}, sum(lengths)

    def _backward_with_words(
        self, draw: Draw, encodings: list[Encoding], places: Tensor
    ) -> dict[str, float]:
        assert self.words is not None
        texts = [draw.in_order[i] for i in places.argsort().tolist()]
        rows = [self.corpus.places.get(text) for text in texts]
        lengths, owners = self.words.runs(encodings)
        wanted = self.words.of(texts, rows, encodings, owners)
        words = self._pooled(encodings, lengths)
        vectors = of_whole_texts(words, lengths, owners).index_select(0, places)
        losses = self.objective.losses(draw, vectors)
        if len(wanted[0]):
            losses["words"] = word_loss(words, *wanted)
        self._weighted(losses).backward()  # type: ignore[no-untyped-call]
        return {name: value.item() for name, value in losses.items()}

    def _weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.objective.weight(n) * x for n, x in losses.items()]).sum()

    # What one step learns from

    def draw(self) -> Draw:
        """The examples, negatives, texts and scored pairs of this step."""
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
                negatives.append(example.negatives[row])
                owners.append(owner)
        drawn = self._texts.draw(self.step, s.texts_per_step) if s.texts_per_step else []
        texts = [corpus.texts[corpus.drawn[row]] for row in drawn]
        rng = np.random.default_rng([s.seed, 6, self.step])
        tasks = [rng.choice(TASKS) if rng.random() < s.instructed else "" for _ in texts]
        scored = [corpus.scored[row] for row in self._scored.draw(self.step, s.scored_per_step)]
        return Draw(examples, negatives, owners, texts, tasks, scored)

    def _as_read(self, prompts: list[Prompted]) -> list[Prompted]:
        """The prompts of this step, part of the texts in another case."""
        if not (share := self.settings.other_case):
            return prompts
        rng = np.random.default_rng([self.settings.seed, 4, self.step])
        return [(recased(text, rng, share), instruction) for text, instruction in prompts]

    def embed(self, prompts: Sequence[Prompted]) -> tuple[Tensor, int]:
        """Vectors [N, D] of the prompts, in their order, and the number of tokens."""
        encodings, places = self._sorted(prompts)
        return self._forward(encodings).index_select(0, places), sum(map(len, encodings))

    def _sorted(self, prompts: Sequence[Prompted]) -> tuple[list[Encoding], Tensor]:
        """The prompts as Encodings, the longest first, and each prompt's place among them."""
        encodings: list[Encoding] = []
        for text, instruction in prompts:
            room = self.settings.max_tokens + self.tokenizer.prompt_tokens(instruction)
            encodings.append(
                self.tokenizer.encode(text, instruction, max_tokens=room, truncate=Truncation.END)
            )
        # Sorted, so that sequences of similar length stand side by side (see attention.py).
        order = sorted(range(len(encodings)), key=lambda i: (-len(encodings[i]), i))
        places = torch.empty(len(order), dtype=torch.long)
        places[torch.tensor(order)] = torch.arange(len(order))
        return [encodings[i] for i in order], places.to(self.device)

    def _forward(self, encodings: Sequence[Encoding]) -> Tensor:
        """Vectors [N, D] in the order given."""
        return F.normalize(self._pooled(encodings), dim=-1)

    def _pooled(self, encodings: Sequence[Encoding], runs: Sequence[int] | None = None) -> Tensor:
        """The pooler's [N, D] in the order given, or [W, D] of runs of so many pooled rows each."""
        batch = pack(encodings, self.device, pooled=self.family.pooled)
        with (
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
            sdpa_kernel(SDPBackend.MATH),  # for the pooler; the fused one is slow backwards
        ):
            pooled = batch.pooled if runs is None else segments_of(runs, self.device)
            return self.model.pooled(batch, pooled, grouped_products)

    # Validation

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On the held-out rows: cosine to the teacher; MRR of positives among one another; rank
        correlation of cosines with scores."""
        self.model.eval()  # no dropout, and so no random numbers
        corpus = self.corpus
        scores: dict[str, float] = {}
        if rows := corpus.held_out_texts:
            bare = self.family.prompt("passage")
            vectors = self._embed_all([(corpus.texts[row], bare) for row in rows])
            targets = torch.from_numpy(corpus.targets[rows])
            scores["validation_cosine"] = round((vectors * targets).sum(-1).mean().item(), 5)
        if corpus.held_out:
            family, held_out = self.family, corpus.held_out
            queries = self._embed_all([(e.query, query_prompt(family, e)) for e in held_out])
            found = self._embed_all([(e.positive, passage_prompt(family, e)) for e in held_out])
            similar = queries @ found.T
            ranks = (similar > similar.diagonal()[:, None]).sum(-1) + 1
            scores["validation_mrr"] = round((1 / ranks).mean().item(), 5)
        if pairs := corpus.held_out_scored:
            around = [self.family.prompt("query", pair.task) for pair in pairs]
            first = self._embed_all([(p.first, a) for p, a in zip(pairs, around, strict=True)])
            second = self._embed_all([(p.second, a) for p, a in zip(pairs, around, strict=True)])
            cosines = (first * second).sum(-1).numpy()
            wanted = np.array([pair.score for pair in pairs])
            scores["validation_spearman"] = round(float(spearman(cosines, wanted)), 5)
        self.model.train()
        return scores

    @torch.no_grad()
    def embed_texts(
        self, texts: Sequence[str], side: Side, task: str = "", /
    ) -> NDArray[np.float32]:
        """An `Embedder` of the weights as they are now."""
        prompt = self.family.prompt(side, task)
        self.model.eval()
        vectors = self._embed_all([(text, prompt) for text in texts])
        self.model.train()
        return vectors.numpy()

    def _embed_all(self, prompts: Sequence[Prompted]) -> Tensor:
        parts = [self.embed(prompts[i : i + 128])[0] for i in range(0, len(prompts), 128)]
        return torch.cat(parts).cpu()


def _autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 where it is fast: on GPUs and on processors that have it."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or resources.has_bfloat16() else "float32"
    return torch.bfloat16 if name == "bfloat16" else None
