"""A labelled CSV or a file of scored pairs -> training lines, for one's own data.

    python -m model.training.convert labelled data.csv --task banking77 -o out.jsonl
    python -m model.training.convert sts pairs.tsv -o out.jsonl

The rules of the shipped model's stage 2 (stages.py) with a teacher that picks the negatives. The
files are those of `nv-embed evaluate`. Knows nothing of where the data come from.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from model import console
from model.errors import ModelError
from model.training.evaluation import read_sts, task_texts
from model.training.examples import Example, ScoredPair, check_output, write_examples
from model.training.sources import SEED, TASK_STS, read_labelled_rows
from model.training.stages import BY, CLASS_EXAMPLES, Known, label_text, sts_examples
from model.training.teacher import Teacher


def known_by(teacher: Teacher, texts: Sequence[str]) -> Known:
    once = list(dict.fromkeys(texts))
    return Known(once, teacher.encode(once, progress=sys.stderr.isatty()))


def labelled_examples(
    path: Path, task: str, teacher: Teacher, *, by: str, everything: bool
) -> list[Example]:
    """by: example or label. everything: the rows that `nv-embed evaluate` would score, too."""
    rows = [
        (row.text, row.label)
        for row in read_labelled_rows(path)
        if everything or not row.development
    ]
    texts = [text for text, _ in rows]
    if by == "label":
        texts += [label_text(label) for _, label in rows]
    rng = random.Random(SEED)  # noqa: S311
    return CLASS_EXAMPLES[by](rows, known_by(teacher, texts), task, rng)


def scored_examples(path: Path, task: str, teacher: Teacher) -> list[Example]:
    first, second, scores = read_sts(path)
    rows = [ScoredPair(a, b, float(s)) for a, b, s in zip(first, second, scores, strict=True)]
    return sts_examples(rows, known_by(teacher, first + second), task)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m model.training.convert",
        description="Turn a labelled CSV or scored pairs into JSON lines for `nv-embed train`.",
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    labelled = forms.add_parser(
        "labelled",
        help="CSV of text and label",
        description="Each text becomes a query. By example, the positive is another text of its "
        "label, the negatives are 7 of the 28 texts of other labels that the teacher finds "
        "nearest. By label, the positive is the label, written as words, and the negatives are 7 "
        "of the 28 nearest other labels.",
    )
    labelled.add_argument("--by", choices=list(CLASS_EXAMPLES), default="example", help=BY)
    labelled.add_argument("--task", required=True, help="task text, or the name of a task")
    labelled.add_argument(
        "--all",
        dest="everything",
        action="store_true",
        help="also the rows that `nv-embed evaluate` scores: those of split 'test', or, without "
        "that column, one in five",
    )
    scored = forms.add_parser(
        "sts",
        help="pairs with a score from 0 to 5",
        description="Pairs scored 4 and more become examples both ways round. Negatives: the "
        "nearest other sentences that no score of 3 or more joins to the query.",
    )
    scored.add_argument("--task", default=TASK_STS, help="task text or name (default: %(default)s)")
    for form in (labelled, scored):
        form.add_argument("file", type=Path, metavar="FILE", help="as `nv-embed evaluate` reads it")
        form.add_argument("-o", "--out", type=Path, required=True, help="JSON lines")
        form.add_argument(
            "--teacher",
            default="default",
            help="folder of a sentence-transformers model (default: all-MiniLM-L6-v2)",
        )
    arguments = parser.parse_args(argv)
    try:
        task = task_texts(arguments.task)[0]
        check_output(arguments.out, [arguments.file])
        teacher = Teacher(None if arguments.teacher == "default" else arguments.teacher)
        if arguments.form == "labelled":
            examples = labelled_examples(
                arguments.file,
                task,
                teacher,
                by=arguments.by,
                everything=arguments.everything,
            )
        else:
            examples = scored_examples(arguments.file, task, teacher)
        number = write_examples(arguments.out, examples, arguments.file)
        print(f"{number} examples in {arguments.out}")
    except ModelError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(console.run("convert", main))
