#!/bin/sh
# Embed a file of texts without a server: bulk_encode.sh FOLDER writes FOLDER/texts.npy.
set -eu
cd "$1"
cat > texts.txt <<'END'
You can borrow books for four weeks.
The canteen opens at noon.
Dogs must be led.
END
# Ended half-way (Ctrl-C, a crash), the same command with --resume goes on.
nv-embed encode texts.txt -o texts.npy
python -c 'import numpy; print(numpy.load("texts.npy").shape)' # one row a line of the file
