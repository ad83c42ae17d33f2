#!/usr/bin/env bash
# The shipped model's second half: small letters, fresh texts and their words, stage 1 with the
# teacher's soft labels, the mean. Runs in the folder where small.sh has worked; where that has
# made its data alone, it starts from the shipped weights, which is a third half:
#   EVALUATION="/abs/cisi /abs/sts-dev.csv /abs/train.csv" STS=/abs/sts-train.csv \
#     BANKING77=/abs/train.csv QUESTIONS=/abs/questions model/training/recipes/small2.sh [WORK]
# The projection of the start is found again from its vectors (align.py): with a new fit the model
# would have to turn all that it knows.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="${1:-build/small}"
python="${PYTHON:-.venv/bin/python}"
python="$(realpath -s "$(command -v "$python")")"
shipped="$(realpath "$here/../../checkpoints/nv-embed-small")"
export OMP_WAIT_POLICY=PASSIVE
cd "$work"

clean() { # what shares ten words with an evaluation set goes
  "$python" -m model.training.decontamination "$1" ${EVALUATION:-} validation/* -o clean.jsonl
  mv clean.jsonl "$1"
}

for package in perl-doc wamerican-huge; do
  if [ ! -d "debian/$package" ]; then
    (cd debs && apt-get download "$package")
    dpkg -x debs/"$package"_*.deb "debian/$package"
  fi
done
if [ ! -f data/texts2-clean ]; then
  "$python" -m model.training.questions data --debian debian --questions "$QUESTIONS"
  clean data/texts2.jsonl
  clean data/pairs2.jsonl
  touch data/texts2-clean
fi
# The first so many, half of them fresh; one core embeds 150 to 350 a second.
"$python" -m model.training.words data/texts2.jsonl vectors2 words2 --last-text 81920
if [ ! -d lower ]; then # the teacher reads small letters alone, and so does what learns from it
  start=nv-embed-small
  [ -d "$start" ] || start="$shipped"
  rm -rf lower.part
  cp -r "$start" lower.part
  cp "$shipped/tokenizer.json" lower.part/
  mv lower.part lower
fi
if [ ! -f projection.safetensors ]; then
  "$python" -m model.training.align lower projection.safetensors \
    --texts data/texts2.jsonl --vectors vectors2 --last-text 8192
fi
"$python" -m server.cli train "$here/distil5.json" --base . -o runs/distil5
"$python" -m server.cli train "$here/distil6.json" --base . -o runs/distil6
if [ ! -f data3/stages-done ]; then
  mkdir -p data3
  head -n 32768 data/texts2.jsonl > data3/texts.jsonl
  (head -n 8000 data/pairs2.jsonl && head -n 6000 data/pairs.jsonl) > data3/pairs.jsonl
  clean data3/pairs.jsonl # first: what it holds is distilled, too
  "$python" -m model.training.stages data3 --vectors vectors2 --last-text 32768 --embed-pairs \
    --sts "$STS" --banking77 "$BANKING77"
  grep '"Retrieve semantically similar text."' data3/stage2.jsonl > data3/sts.jsonl
  grep 'online banking query' data3/stage2.jsonl > data3/banking.jsonl
  grep -v '"Given a health question\|"Given a country and a topic' data3/stage1.jsonl \
    > data3/general.jsonl
  touch data3/stages-done
fi
"$python" -m server.cli train "$here/stage3.json" --base . -o runs/stage3
"$python" -m server.cli train "$here/stage4.json" --base . -o runs/stage4
"$python" -m model.training.average second lower runs/{distil6,stage3,stage4}/checkpoint
echo "the model: $PWD/second"
