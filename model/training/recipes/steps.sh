# What the recipes of the shipped model share: sourced by small.sh, small2.sh and small3.sh, which
# run in this order in one folder. Every step is skipped when its result exists; a training run that
# was stopped goes on. SHARE=0.1 takes a tenth of all texts, pairs and steps: to see that every step
# works (`make recipe`).
share="${SHARE:-1}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
work="${1:-build/small}"
python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" > /dev/null; then
  echo "$(basename "$0"): there is no $python here: \`make install\`, or set PYTHON" >&2
  exit 2
fi
python="$(realpath -s "$(command -v "$python")")"
shipped="$(realpath "$here/../../checkpoints/nv-embed-small")"
sets=(${STS:+--sts "$(realpath "$STS")"} ${BANKING77:+--banking77 "$(realpath "$BANKING77")"})
QUESTIONS="${QUESTIONS:+$(realpath "$QUESTIONS")}"
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$work"/{debs,debian,prose,lists/partial,cache}
cd "$work"

needs() { # variables that a part cannot do without
  local name
  for name in "$@"; do
    if [ -z "${!name:-}" ]; then
      echo "$(basename "$0"): set $name, as in the first lines of $0" >&2
      exit 2
    fi
  done
}

step() { # its name and how long it took here, two cores shared with other work
  echo "== $1 (about $2 min)"
}

part_of() { # a whole number's share, at least 1, or as many as the second number says
  "$python" -c 'import sys; n, share, least = map(float, sys.argv[1:]); print(round(max(least, n * share)))' \
    "$1" "$share" "${2:-1}"
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

package() { # Debian packages, unpacked below debian/
  local name
  for name in "$@"; do
    if [ ! -d "debian/$name" ]; then
      rm -f debs/"$name"_*.deb # of another version
      (cd debs && apt-get download "$name")
      rm -rf "debian/$name.part"
      dpkg -x debs/"$name"_*.deb "debian/$name.part"
      mv "debian/$name.part" "debian/$name"
    fi
  done
}
