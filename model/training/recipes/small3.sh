#!/usr/bin/env bash
# The third part: all texts and captions, distilled for long, then stage 1 with all pairs, questions
# about rare terms, utterances, and the order of the STS scores. Runs in the folder where small2.sh
# has worked; without its outcome, from the shipped weights.
#   EVALUATION="/abs/cisi /abs/sts-dev.csv /abs/train.csv" STS=/abs/sts-train.csv \
#     BANKING77=/abs/train.csv QUESTIONS=/abs/questions model/training/recipes/small3.sh [WORK]
# PARALLEL=1 trains both runs of stage 1 at a time, one on each core.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
needs STS BANKING77 QUESTIONS

step "rare terms and captions" 4
if [ ! -f data/texts3.jsonl ]; then
  "$python" -m model.training.terms data
  "$python" -m model.training.captions data/captions.jsonl --most "$(part_of 60000)"
  for made in pairs pairs2 pairs3 captions; do
    clean "data/$made.jsonl"
  done
  before="$(part_of 557056)"
  {
    head -n "$before" data/texts2.jsonl
    cat data/captions.jsonl
    tail -n "+$((before + 1))" data/texts2.jsonl
  } > texts3.part
  mv texts3.part data/texts3.jsonl
fi
step "the teacher's vectors of all texts" 45
mkdir -p vectors3
for shard in vectors2/*.npy; do # of the same texts
  [ -f "vectors3/${shard##*/}" ] || cp "$shard" vectors3/
done
"$python" -m model.training.teacher data/texts3.jsonl vectors3
if [ ! -d third-start ]; then
  start=second
  [ -d "$start" ] || start="$shipped"
  rm -rf third-start.part
  cp -r "$start" third-start.part
  mv third-start.part third-start
fi
step "distillation" 55
train distil7
train distil8
train distil9
step "the pairs' negatives" 15
if [ ! -f data7/stages-done ]; then
  mkdir -p data7
  cp data/texts3.jsonl data7/texts.jsonl
  pairs=(data/pairs.jsonl data/pairs2.jsonl data/pairs3.jsonl)
  for file in "${pairs[@]}"; do
    head -n "$(part_of "$(wc -l < "$file")")" "$file"
  done > data7/pairs.jsonl
  "$python" -m model.training.stages data7 --vectors vectors3 --embed-pairs "${sets[@]}" \
    --utterances "$QUESTIONS"
  definitions='"Given a word, retrieve its definition"\|"Retrieve semantically similar text."'
  grep "$definitions" data7/stage1.jsonl > data7/definitions.jsonl
  grep -v "$definitions" data7/stage1.jsonl > data7/retrieval.jsonl
  "$python" - data/pairs3.jsonl data7/retrieval.jsonl > data7/no-terms.jsonl <<'END'
import json, sys
terms = {json.loads(line)["query"] for line in open(sys.argv[1], encoding="utf-8")}
for line in open(sys.argv[2], encoding="utf-8"): # for ablation-third.json
    if json.loads(line)["query"] not in terms:
        sys.stdout.write(line)
END
  grep '"Given a online banking query\|"Given a user utterance' data7/stage2.jsonl \
    > data7/classes.jsonl
  clean data7/scored.jsonl
  clean data7/classes.jsonl
  touch data7/stages-done
fi
step "stage 1, twice, and the mean" 130
if [ -n "${PARALLEL:-}" ]; then
  train stage5 &
  other=$!
  train stage6 || { wait "$other" || true; exit 1; }
  wait "$other"
else
  train stage5
  train stage6
fi
"$python" -m model.training.average third runs/{stage5,stage6}/checkpoint
echo "the model: $PWD/third"
