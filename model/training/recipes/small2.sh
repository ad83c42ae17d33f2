#!/usr/bin/env bash
# The second part: small letters, fresh texts and their words, stage 1 with the teacher's soft
# labels, the mean. Runs in the folder where small.sh has worked; where that has made its data
# alone, it starts from the shipped weights, which is one part more.
#   EVALUATION="/abs/cisi /abs/sts-dev.csv /abs/train.csv" STS=/abs/sts-train.csv \
#     BANKING77=/abs/train.csv QUESTIONS=/abs/questions model/training/recipes/small2.sh [WORK]
# The projection of the start is found again from its vectors (align.py): with a new fit the model
# would have to turn all that it knows.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
needs STS BANKING77 QUESTIONS

step "fresh texts" 5
package perl-doc wamerican-huge
if [ ! -f data/texts2-clean ]; then
  "$python" -m model.training.questions data --debian debian --questions "$QUESTIONS"
  if [ "$share" != 1 ]; then # small.sh has cut the others
    head -n "$(part_of 881236)" data/texts2.jsonl > texts2.part
    mv texts2.part data/texts2.jsonl
  fi
  clean data/texts2.jsonl
  clean data/pairs2.jsonl
  touch data/texts2-clean
fi
step "the teacher's vectors, and of words" 15
# The first so many, half of them fresh; one core embeds 150 to 350 a second.
"$python" -m model.training.words data/texts2.jsonl vectors2 words2 --last-text "$(part_of 81920 2048)"
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
    --texts data/texts2.jsonl --vectors vectors2 --last-text "$(part_of 8192 2048)" # fewer are none to fit to
fi
step "distillation word by word, then of whole texts" 12
train distil5
train distil6
step "stage 1, twice, and the mean" 20
if [ ! -f data3/stages-done ]; then
  mkdir -p data3
  head -n "$(part_of 32768)" data/texts2.jsonl > data3/texts.jsonl
  (head -n "$(part_of 8000)" data/pairs2.jsonl && head -n "$(part_of 6000)" data/pairs.jsonl) > data3/pairs.jsonl
  clean data3/pairs.jsonl # first: what it holds is distilled, too
  "$python" -m model.training.stages data3 --vectors vectors2 --last-text "$(part_of 32768)" --embed-pairs \
    "${sets[@]}"
  grep '"Retrieve semantically similar text."' data3/stage2.jsonl > data3/sts.jsonl
  grep 'online banking query' data3/stage2.jsonl > data3/banking.jsonl
  grep -v '"Given a health question\|"Given a country and a topic' data3/stage1.jsonl \
    > data3/general.jsonl
  touch data3/stages-done
fi
train stage3
train stage4
"$python" -m model.training.average second lower runs/{distil6,stage3,stage4}/checkpoint
echo "the model: $PWD/second"
