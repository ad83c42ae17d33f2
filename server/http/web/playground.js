// The playground: reads the form, asks for two sets of vectors, and shows what comes of them.

const MOST_PASSAGES = 100;
const STATE_EVERY_MS = 5000;
let server = null; // of /info, once it was told
let named = new Map(); // task -> its texts, of /v1/instructions
let template = null; // what a query stands behind; null: this family takes no instruction
let shown = null; // what the results on the page were asked with
let running = null; // AbortController of the request that is on its way

async function showState() {
  let words = "ready";
  let good = true;
  try {
    const answer = await send("/readyz");
    if (!answer.ok) {
      const said = await answer.json().catch(() => null); // null: of a proxy, perhaps
      words = said?.error?.message ?? `not ready (${answer.status})`;
      good = false;
    }
  } catch (refused) {
    [words, good] = [refused.message, false];
  }
  const state = byId("state");
  if (state.textContent !== words) state.textContent = words; // a screen reader says it again
  state.className = `state ${good ? "good" : "bad"}`;
  if (good && (server === null || server.devices.length === 0) && byId("key-form").hidden) learn();
}

/** What runs here: the model, the tasks. Asks for a key where one is needed. */
async function learn() {
  try {
    server = (await ask("/info")).parsed;
    const { parsed } = await ask("/v1/instructions");
    named = new Map(parsed.data.map((task) => [task.task, task]));
    template = parsed.template;
    const tasks = [...named.keys()].map((task) => make("option", { text: task }));
    byId("task").replaceChildren(...tasks);
    for (const option of byId("query-side").options)
      if (["instruction", "task"].includes(option.value)) option.disabled = template === null;
    named.set("", { query: parsed.query_instruction });
    byId("key-says").textContent = "";
    byId("model").textContent = server.model;
    showReading();
    showFacts(null);
  } catch (refused) {
    if (refused.status === 401) askForKey(apiKey ? refused.message : "This server asks for a key.");
    else byId("said").textContent = refused.message;
  }
}

function choice() {
  return {
    querySide: byId("query-side").value,
    instruction: byId("instruction").value,
    task: byId("task").value,
    passageSide: byId("passage-side").value,
  };
}

/** What the model reads before the query. */
function showReading() {
  const { querySide, instruction, task } = choice();
  byId("instruction-part").hidden = querySide !== "instruction";
  byId("task-part").hidden = querySide !== "task";
  const words = {
    query: named.get("")?.query,
    instruction,
    task: named.get(task)?.query,
    passage: "",
    none: "",
  }[querySide];
  const before = template && words ? template.split("{task}").join(words) : "";
  byId("reads").textContent = before && `Before it stands: ${before.replaceAll("\n", " ⏎ ")}`;
}

function showFacts(answered) {
  if (server === null) return;
  const devices = server.devices.map((d) => `${d.device} (${d.dtype}, ${d.quantization})`);
  const facts = {
    Model: server.model_id,
    Fingerprint: answered?.fingerprint ?? "shown with the first vectors",
    Family: `${server.family}, pooler ${server.pooler}, ${server.mask} mask`,
    Dimensions: server.dimensions,
    Devices: devices.join(", ") || "none yet",
    "Longest input": `${server.limits.max_input_tokens} tokens`,
    Licence: server.license ?? "not named",
    Version: server.version,
  };
  if (answered) facts["Last answer"] = `${answered.tokens} tokens in ${answered.ms} ms`;
  const parts = Object.entries(facts).flatMap(([name, text]) => [
    make("dt", { text: name }),
    make("dd", { text: `${text}` }),
  ]);
  byId("facts").replaceChildren(...parts);
}

async function vectorsOf(input, fields, signal) {
  const body = { model: server.model, input, ...fields, encoding_format: "base64" };
  const { parsed, headers } = await ask("/v1/embeddings", body, signal);
  return {
    vectors: parsed.data.map((item) => decodeVector(item.embedding)),
    tokens: parsed.usage.prompt_tokens,
    fingerprint: headers.get("x-nv-embed-fingerprint"),
  };
}

async function embed() {
  const query = byId("query").value.trim();
  const lines = byId("passages").value.split("\n").map((line) => line.trim());
  const passages = lines.filter((line) => line !== "");
  if (query === "" || passages.length === 0)
    return say("Write a query and at least one passage.", true);
  if (passages.length > MOST_PASSAGES)
    return say(`${passages.length} passages are too many.`, true);
  if (server === null) await learn();
  if (server === null) return say("The server has not said which model it serves.", true);
  running?.abort();
  const mine = new AbortController();
  running = mine;
  say("Embedding …");
  const fields = fieldsOf(choice());
  const started = performance.now();
  try {
    const [asked, found] = await Promise.all([
      vectorsOf([query], fields.query, mine.signal),
      vectorsOf(passages, fields.passages, mine.signal),
    ]);
    const ms = Math.round(performance.now() - started);
    shown = {
      url: `${BASE}/v1`,
      model: server.model,
      needsKey: apiKey !== "",
      query: { text: query, fields: fields.query },
      passages: { texts: passages, fields: fields.passages },
    };
    show([...asked.vectors, ...found.vectors], passages);
    showFacts({ fingerprint: asked.fingerprint, tokens: asked.tokens + found.tokens, ms });
    say(`Done in ${ms} ms.`);
  } catch (refused) {
    if (refused.name === "AbortError") return;
    mine.abort();
    if (refused.status === 401) askForKey(refused.message);
    const wait = refused.retryAfter ? ` Try again in ${refused.retryAfter} s.` : "";
    say(refused.message + wait, true);
  }
}

function say(words, bad = false) {
  byId("said").textContent = words;
  byId("said").className = bad ? "error" : "soft";
}

function show(vectors, passages) {
  const products = cosines(vectors);
  showRanking(products[0].slice(1), passages);
  showHeat(products);
  showMap(products);
  showCode();
  byId("empty").hidden = true;
  byId("results").hidden = false;
}

function showRanking(scores, passages) {
  const share = scale([0, ...scores]);
  const items = ranking(scores).map((place) => {
    const bar = make("span", { kind: "bar", "aria-hidden": "true" });
    bar.style.width = `${100 * share(Math.max(scores[place], 0))}%`;
    return make("li", {},
      make("span", { kind: "soft number", text: `${place + 1}` }),
      make("strong", { kind: "number", text: scores[place].toFixed(3) }),
      make("span", { kind: "text", text: passages[place] }),
      bar,
    );
  });
  byId("ranking").replaceChildren(...items);
}

function nameOf(place) {
  return place === 0 ? "Q" : `${place}`;
}

function showHeat(products) {
  const off = products.flatMap((row, i) => row.filter((_, j) => i !== j));
  const share = scale(off);
  const heads = products.map((_, i) => make("th", { text: nameOf(i), scope: "col" }));
  const head = make("tr", {}, make("td"), ...heads);
  const rows = products.map((row, i) =>
    make("tr", {},
      make("th", { text: nameOf(i), scope: "row" }),
      ...row.map((cosine, j) => {
        const cell = make("td", { text: cosine.toFixed(2) });
        if (i !== j) {
          const { background, ink } = heatColours(share(cosine));
          cell.style.background = background;
          cell.style.color = ink;
        }
        return cell;
      }),
    ),
  );
  byId("heat").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

function showMap(products) {
  const { points, shares } = principalMap(products);
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  const middle = (all) => (Math.min(...all) + Math.max(...all)) / 2;
  const span = (all) => Math.max(...all) - Math.min(...all);
  const unit = Math.min(340 / (span(xs) || 1), 250 / (span(ys) || 1)); // one unit for both axes
  const map = byId("map");
  const draw = (name, attributes, text = "") => {
    const element = document.createElementNS(map.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };
  const frame = draw("rect", { class: "frame", x: 0.5, y: 0.5, width: 399, height: 299 });
  const x = (i) => 200 + (xs[i] - middle(xs)) * unit;
  const y = (i) => 150 - (ys[i] - middle(ys)) * unit;
  const places = [...points.keys()].reverse(); // the query comes last, above all others
  const dots = places.map((i) =>
    draw("circle", { class: i ? "passage" : "query", cx: x(i), cy: y(i), r: i ? 4 : 6 }),
  );
  const besideAnother = (i) =>
    places.some((j) => x(j) > x(i) && x(j) - x(i) < 28 && Math.abs(y(j) - y(i)) < 12);
  const names = places.map((i) => {
    const left = besideAnother(i) && x(i) > 30;
    const at = { x: x(i) + (left ? -8 : 8), y: y(i) + 4, "text-anchor": left ? "end" : "start" };
    return draw("text", at, nameOf(i));
  });
  map.replaceChildren(frame, ...dots, ...names);
  const percent = shares.map((share) => `${Math.round(100 * share)} %`);
  byId("map-says").textContent =
    `The vectors on their two principal axes, which hold ${percent.join(" and ")} of their ` +
    "variance: what the axes leave out may still part points that look near.";
}

function showCode() {
  byId("code").textContent = SNIPPETS[byId("language").value](shown);
  byId("copied").textContent = "";
}

async function copyCode() {
  try {
    await navigator.clipboard.writeText(byId("code").textContent);
    byId("copied").textContent = "copied";
  } catch {
    getSelection().selectAllChildren(byId("code")); // no clipboard without https
    byId("copied").textContent = "selected: press Ctrl + C";
  }
}

if (byId("docs")) byId("docs").href = `${BASE}/docs`;
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  embed();
});
byId("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
for (const id of ["query-side", "instruction", "task"])
  byId(id).addEventListener("input", showReading);
byId("language").addEventListener("input", showCode);
byId("copy").addEventListener("click", copyCode);
watchKey(learn);
learn();
showState();
setInterval(() => document.visibilityState === "visible" && showState(), STATE_EVERY_MS);
