// How a page asks the server that it came from: where it is, the key, and what went wrong.

// What a proxy puts before this page's path, it puts before the others' as well.
const BASE = location.origin + location.pathname.replace(/\/(docs|redoc)?\/*$/, "");
let apiKey = ""; // in this page's memory alone: a reload forgets it

class Refused extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status; // 0: the server was not reached
    this.retryAfter = retryAfter;
  }
}

/** What fetch answers, for whatever status. Raises Refused when nothing answers. */
async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  try {
    return await fetch(BASE + path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer.", 0, null);
  }
}

/** The parsed answer and its headers. Raises Refused with the server's own words. */
async function ask(path, body, signal) {
  const post = { method: "POST", body: JSON.stringify(body) };
  const options = body === undefined ? {} : post;
  if (body !== undefined) options.headers = { "Content-Type": "application/json" };
  const answer = await send(path, { ...options, signal });
  const text = await answer.text();
  let parsed = null;
  try {
    parsed = JSON.parse(text);
  } catch {
    // a proxy's page, for instance
  }
  if (!answer.ok || parsed === null) {
    const words = parsed?.error?.message ?? `The server answers ${answer.status}.`;
    throw new Refused(words, answer.status, answer.headers.get("retry-after"));
  }
  return { parsed, headers: answer.headers };
}

const byId = (id) => document.getElementById(id);

/** An element with a class, a text and children. */
function make(name, { text, kind, ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** `entered` is called when there is a new key. */
function watchKey(entered) {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey = byId("key").value.trim();
    entered();
  });
}

/** Show the field for a key, for the server asks for one. */
function askForKey(words) {
  byId("key-form").hidden = false;
  byId("key-says").textContent = words;
}
