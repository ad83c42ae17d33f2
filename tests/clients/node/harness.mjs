// As tests/clients/adapters/harness.py, for Node: a job on stdin, a line of JSON for each client.

import { readFileSync } from "node:fs";
import * as adapters from "./adapters.mjs";

const job = JSON.parse(readFileSync(0, "utf8"));
console.log = console.error; // some clients print
const versions = JSON.parse(readFileSync(new URL("package.json", import.meta.url))).dependencies;

async function attempt(what) {
  try {
    return { value: await what() };
  } catch (error) {
    const said = [];
    for (let cause = error; cause && said.length < 5; cause = cause.cause)
      said.push(`${cause.name}: ${cause.message}`);
    return { error: said.join("\n") };
  }
}

async function tried(client) {
  const server = job.servers[client.server];
  const at = ({ path = "", key = server.key, suffix = "", model = server.model }) =>
    adapters[client.adapter]({ url: server.url + path, key, model: model + suffix });
  const passages = async (waiting, texts = job.passages) => {
    const ways = await waiting;
    if (client.ranks) return ways.scores(job.question, texts);
    return (await ways.passages(texts)).map((row) => Array.from(row));
  };
  const query = async (waiting) => {
    const ways = await waiting;
    const { question } = job;
    return Array.from(ways.query ? await ways.query(question) : (await ways.passages([question]))[0]);
  };
  const found = { passages: await attempt(() => passages(at({}))) };
  if (found.passages.error && client.give_up) return found;
  const mistakes = {
    model: await attempt(() => passages(at({ model: "no-such-model" }))),
    long: await attempt(() => passages(at({}), [job.long])),
    key: await attempt(() => passages(at({ key: "wrong-key" }))),
  };
  if (client.ranks) return { ...found, ...mistakes };
  return {
    ...found,
    ...mistakes,
    query: await attempt(async () => ((await at({})).query ? query(at({})) : null)),
    by_suffix: await attempt(() => query(at({ suffix: "-query" }))),
    by_url: await attempt(() => query(at({ path: "/query" }))),
  };
}

for (const client of job.clients) {
  const started = performance.now();
  const found = await tried(client);
  const seconds = Math.round((performance.now() - started) / 100) / 10;
  const line = { ...found, name: client.name, version: versions[client.package], seconds };
  process.stdout.write(`${JSON.stringify(line)}\n`);
}
