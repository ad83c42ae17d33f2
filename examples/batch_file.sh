#!/bin/sh
# OpenAI's batch files, without a server: batch_file.sh FOLDER writes FOLDER/answers.jsonl.
set -eu
cd "$1"
cat > batch.jsonl <<'END'
{"custom_id": "q1", "method": "POST", "url": "/v1/embeddings", "body": {"model": "nv-embed-small", "input": "when is lunch served?", "input_type": "query"}}
{"custom_id": "p1", "method": "POST", "url": "/v1/embeddings", "body": {"model": "nv-embed-small", "input": ["The canteen opens at noon.", "Dogs must be led."]}}
END
nv-embed encode batch.jsonl --openai-batch -o answers.jsonl
# Each line is an answer, joined to its request by custom_id.
python - <<'END'
import json

for line in open("answers.jsonl", encoding="utf-8"):
    answer = json.loads(line)
    body = answer["response"]["body"]
    print(answer["custom_id"], answer["response"]["status_code"], len(body["data"]))
END
