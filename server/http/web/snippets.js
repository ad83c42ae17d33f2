// The code that makes the same requests. Knows no page: the tests run what it writes.

/** One shell word. */
function shellWord(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** asked: {url, model, needsKey, query: {text, fields}, passages: {texts, fields}} -> curl. */
function curlOf(asked) {
  const requests = [
    ["the query", { model: asked.model, input: [asked.query.text], ...asked.query.fields }],
    ["the passages", { model: asked.model, input: asked.passages.texts, ...asked.passages.fields }],
  ];
  const key = asked.needsKey ? ' \\\n  -H "Authorization: Bearer $OPENAI_API_KEY"' : "";
  return requests
    .map(
      ([name, body]) =>
        `# ${name}\ncurl ${shellWord(`${asked.url}/embeddings`)} ` +
        `-H 'Content-Type: application/json'${key} \\\n  -d ${shellWord(JSON.stringify(body))}\n`,
    )
    .join("\n");
}

/** Likewise in Python. A string of JSON is one of Python, too. */
function pythonOf(asked) {
  const key = asked.needsKey ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  return `${asked.needsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(asked.url)}, api_key=${key})


def embed(texts, **fields):
    answer = client.embeddings.create(
        model=${JSON.stringify(asked.model)}, input=texts, extra_body=fields
    )
    return [item.embedding for item in answer.data]


texts = ${listOf(asked.passages.texts, "    ")}
question = ${JSON.stringify(asked.query.text)}
(query,) = embed([question]${pythonFields(asked.query.fields)})
passages = embed(texts${pythonFields(asked.passages.fields)})
scores = [sum(a * b for a, b in zip(query, passage)) for passage in passages]
for score, text in sorted(zip(scores, texts), reverse=True):
    print(f"{score:.3f}  {text}")
`;
}

/** Likewise in JavaScript. */
function javascriptOf(asked) {
  const key = asked.needsKey ? "process.env.OPENAI_API_KEY" : '"none"';
  return `import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${JSON.stringify(asked.url)}, apiKey: ${key} });

async function embed(input, fields) {
  const model = ${JSON.stringify(asked.model)};
  const answer = await client.embeddings.create({ model, input, ...fields });
  return answer.data.map((item) => item.embedding);
}

const texts = ${listOf(asked.passages.texts, "  ")};
const question = ${JSON.stringify(asked.query.text)};
const [query] = await embed([question], ${JSON.stringify(asked.query.fields)});
const passages = await embed(texts, ${JSON.stringify(asked.passages.fields)});
const scores = passages.map((passage) => passage.reduce((sum, x, i) => sum + x * query[i], 0));
texts
  .map((text, i) => [scores[i], text])
  .sort((a, b) => b[0] - a[0])
  .forEach(([score, text]) => console.log(score.toFixed(3) + "  " + text));
`;
}

function listOf(texts, indent) {
  return `[\n${texts.map((text) => `${indent}${JSON.stringify(text)},\n`).join("")}]`;
}

function pythonFields(fields) {
  return Object.entries(fields)
    .map(([name, value]) => `, ${name}=${JSON.stringify(value)}`)
    .join("");
}

/** The fields of a request for each side, from what is chosen on the page. */
function fieldsOf({ querySide, instruction, task, passageSide }) {
  const query = {
    query: { input_type: "query" },
    instruction: { instruction },
    task: { task, input_type: "query" },
    passage: { input_type: "passage" },
    none: {},
  }[querySide];
  const own = querySide === "task" ? { task, input_type: "passage" } : { input_type: "passage" };
  return { query, passages: passageSide === "same" ? query : own };
}

const SNIPPETS = { curl: curlOf, python: pythonOf, javascript: javascriptOf };
