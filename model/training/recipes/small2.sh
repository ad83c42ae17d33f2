#!/usr/bin/env bash
# The shipped model's next distillation: fresh texts, every second one in another case. Runs in the
# folder where small.sh has worked, or has at least made its data:
#   EVALUATION="/abs/cisi /abs/sts-dev.csv /abs/train.csv" QUESTIONS=/abs/questions \
#     model/training/recipes/small2.sh [WORK]
# Starts from the shipped weights. Their projection is found again from them (align.py): with a
# new fit the model would have to turn all that it knows.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="${1:-build/small}"
python="${PYTHON:-.venv/bin/python}"
python="$(realpath -s "$(command -v "$python")")"
export OMP_WAIT_POLICY=PASSIVE
cd "$work"

for package in perl-doc wamerican-huge; do
  if [ ! -d "debian/$package" ]; then
    (cd debs && apt-get download "$package")
    dpkg -x debs/"$package"_*.deb "debian/$package"
  fi
done
if [ ! -f data/texts2-clean ]; then
  "$python" -m model.training.questions data --debian debian --questions "$QUESTIONS"
  for file in data/texts2.jsonl data/pairs2.jsonl; do
    "$python" -m model.training.decontamination "$file" ${EVALUATION:-} validation/* -o clean.jsonl
    mv clean.jsonl "$file"
  done
  touch data/texts2-clean
fi
# The first so many, half of them fresh; one core embeds about 200 a second.
"$python" -m model.training.teacher data/texts2.jsonl vectors2 --last-text "${TEXTS:-163840}"
if [ ! -f projection.safetensors ]; then
  "$python" -m model.training.align nv-embed-small projection.safetensors \
    --texts data/texts2.jsonl --vectors vectors2
fi
"$python" -m server.cli train "$here/distil4.json" --base . -o runs/distil4
echo "the model: $PWD/runs/distil4/checkpoint"
