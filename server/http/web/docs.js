// The interface as openapi.json describes it: each route, its fields, statuses, and a way to try.

let document_ = null; // the OpenAPI document

const EXAMPLES = {
  // of a body by its schema; the model may be left out, for there is only one
  EmbeddingsRequest: { input: ["when is lunch served?"], input_type: "query" },
  TokenizeRequest: { input: ["when is lunch served?"], input_type: "query" },
};

async function read() {
  try {
    document_ = (await ask("/openapi.json")).parsed;
  } catch (refused) {
    byId("said").textContent = refused.message;
    if (refused.status === 401) askForKey(apiKey ? refused.message : "This server asks for a key.");
    return;
  }
  byId("key-says").textContent = "";
  byId("said").textContent = document_.info.summary;
  byId("version").textContent = `${document_.info.title} ${document_.info.version}`;
  const groups = new Map();
  for (const [path, methods] of Object.entries(document_.paths))
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "other";
      groups.set(tag, [...(groups.get(tag) ?? []), routeOf(path, method, operation)]);
    }
  const cards = [...groups].map(([tag, routes]) =>
    make("section", { kind: "card", "aria-label": tag }, make("h2", { text: tag }), ...routes),
  );
  byId("routes").replaceChildren(...cards);
}

function routeOf(path, method, operation) {
  const schema = operation.requestBody?.content?.["application/json"]?.schema;
  const head = make("summary", {},
    make("span", { kind: "method", text: method.toUpperCase() }), make("code", { text: path }));
  const parts = [make("p", { text: operation.description ?? operation.summary ?? "" })];
  if (schema) parts.push(make("h3", { text: "Body" }), fieldTable(resolved(schema)));
  parts.push(make("h3", { text: "Answers" }), statusTable(operation.responses));
  const form = trial(path, method, schema, operation.parameters ?? []);
  parts.push(make("h3", { text: "Try it" }), form);
  return make("details", {}, head, ...parts);
}

function resolved(schema) {
  const name = schema.$ref?.split("/").pop();
  return name ? document_.components.schemas[name] : schema;
}

/** A schema's type in a few words. */
function typeOf(schema) {
  if (schema.$ref) return typeOf(resolved(schema)) || schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  const several = schema.anyOf ?? schema.oneOf;
  if (several) {
    const kinds = several.filter((one) => one.type !== "null").map(typeOf);
    return [...new Set(kinds)].join(" or ");
  }
  if (schema.type === "array") return `list of ${schema.items ? typeOf(schema.items) : "anything"}`;
  return schema.type ?? "anything";
}

function table(heads, rows) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { text, scope: "col" })));
  const body = rows.map((row) => make("tr", {}, ...row.map((text) => make("td", { text }))));
  return make("table", { kind: "fields" }, make("thead", {}, head), make("tbody", {}, ...body));
}

function fieldTable(schema) {
  const needed = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => [
    needed.has(name) ? `${name} (required)` : name,
    typeOf(field),
    field.description ?? resolved(field).description ?? "",
  ]);
  return table(["Field", "Type", "What it does"], rows);
}

function statusTable(responses) {
  const rows = Object.entries(responses).map(([status, { description }]) => [status, description]);
  return table(["Status", "When"], rows);
}

/** A body to edit and a button; below them what the server answers. */
function trial(path, method, schema, parameters) {
  const name = `${method}${path}`.replace(/\W+/g, "-");
  const form = make("form", { "aria-label": `${method.toUpperCase()} ${path}` });
  const values = parameters.filter((one) => one.in === "path").map((one) => {
    const id = `${name}-${one.name}`;
    const input = make("input", { id, required: "" });
    form.append(make("label", { for: id, text: one.name }), input);
    return [one.name, input];
  });
  let body = null;
  if (schema) {
    const example = EXAMPLES[schema.$ref?.split("/").pop()] ?? {};
    const text = JSON.stringify(example, null, 2);
    const options = { id: `${name}-body`, rows: 7, spellcheck: "false" };
    body = make("textarea", { ...options, kind: "code", text });
    form.append(make("label", { for: body.id, text: "Body" }), body);
  }
  const answer = make("pre", { tabindex: 0, role: "region", "aria-label": "Answer", hidden: "" });
  const said = make("span", { role: "status" });
  form.append(make("div", { kind: "row" }, make("button", { text: "Send" }), said), answer);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    let real = path;
    for (const [key, input] of values)
      real = real.replace(`{${key}}`, encodeURIComponent(input.value));
    show(real, method, body?.value, said, answer);
  });
  return form;
}

const MOST_SHOWN = 20_000;

async function show(path, method, body, said, answer) {
  const options = { method: method.toUpperCase(), body };
  if (body !== undefined) options.headers = { "Content-Type": "application/json" };
  said.textContent = "waiting …";
  answer.hidden = true;
  try {
    const got = await send(path, options);
    const text = await got.text();
    const heads = [...got.headers].filter(([key]) => key.startsWith("x-") || key === "retry-after");
    said.textContent = `${got.status}`;
    answer.hidden = false;
    const lines = heads.map(([key, value]) => `${key}: ${value}\n`);
    answer.textContent = `${lines.join("")}\n${pretty(text)}`;
    if (got.status === 401) askForKey("This route asks for a key.");
  } catch (refused) {
    said.textContent = refused.message;
  }
}

/** JSON indented, but each list of numbers on a line of its own; the beginning of what is long. */
function pretty(text) {
  let shown = text;
  try {
    shown = JSON.stringify(JSON.parse(text), null, 2);
    shown = shown.replace(/\[\s+(-?[\d.e+-]+,?\s+)+\]/g, (list) => list.replace(/\s+/g, " "));
  } catch {
    // metrics are no JSON
  }
  return shown.length > MOST_SHOWN ? `${shown.slice(0, MOST_SHOWN)}\n…` : shown;
}

if (byId("playground")) byId("playground").href = `${BASE}/`;
watchKey(read);
read();
