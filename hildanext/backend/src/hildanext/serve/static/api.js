/** The service as the page needs it: JSON calls and event streams, errors as words. Knows no page. */

const KEY = "hilda-key";

export class ApiError extends Error {
  /** `status` is 0 where no answer came at all. */
  constructor(message, { hint = "", status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    this.hint = hint;
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

export function getKey() {
  try { return sessionStorage.getItem(KEY) ?? ""; } catch { return getKey.kept ?? ""; }
}

/** Kept for this tab alone, and only in this tab's memory where storage is forbidden. */
export function setKey(key) {
  getKey.kept = key;
  try {
    if (key) sessionStorage.setItem(KEY, key); else sessionStorage.removeItem(KEY);
  } catch { /* kept above */ }
}

function address(path) {
  return new URL(path, document.baseURI);
}

async function ask(path, { method = "GET", body, signal, accept = "application/json" } = {}) {
  const headers = { Accept: accept };
  const key = getKey();
  // A header holds Latin-1 only: another key cannot be right, and must not look like a dead server.
  if (key && !/^[\x21-\x7e]+$/.test(key)) throw new ApiError("the API key has a character that no key has", { status: 401 });
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(address(path), { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (problem) {
    throw gone(problem);
  }
  if (!answer.ok) throw await refused(answer);
  return answer;
}

function gone(problem) {
  if (problem.name === "AbortError") return problem;
  return new ApiError("the server does not answer", { hint: "see whether it still runs: hildanext serve" });
}

async function refused(answer) {
  let told = {};
  try { told = (await answer.json()).error ?? {}; } catch { /* not ours: a proxy, perhaps */ }
  const retryAfter = Number(answer.headers.get("Retry-After")) || null;
  const message = told.message ?? `the server answered ${answer.status} ${answer.statusText}`.trim();
  let hint = told.hint ?? "";
  if (answer.status === 401 && !hint) hint = "enter the API key above";
  if (retryAfter) hint = `${hint}${hint ? "; " : ""}try again in ${retryAfter} s`;
  return new ApiError(message, { hint, status: answer.status, param: told.param ?? null, retryAfter });
}

export async function getJson(path, signal) {
  return (await ask(path, { signal })).json();
}

export async function getBlob(path) {
  return (await ask(path, { accept: "*/*" })).blob();
}

export async function postJson(path, body = {}, signal) {
  return (await ask(path, { method: "POST", body, signal })).json();
}

/** Yields {event, id, data} of a server-sent stream; `data` is parsed JSON. Throws `ApiError` where it breaks off. */
export async function* events(path, { method = "GET", body, signal } = {}) {
  const answer = await ask(path, { method, body, signal, accept: "text/event-stream" });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", over = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      over = done;
      if (done) return;
      const pieces = (rest + value).split(/\r?\n\r?\n/);
      rest = pieces.pop();
      for (const piece of pieces) {
        const found = parse(piece);
        if (found) yield found;
      }
    }
  } catch (problem) {
    if (problem instanceof ApiError) throw problem;
    throw gone(problem);
  } finally {
    if (!over) reader.cancel().catch(() => {});
  }
}

function parse(piece) {
  const found = { event: "message", id: null, data: null };
  const data = [];
  for (const line of piece.split(/\r?\n/)) {
    const at = line.indexOf(":");
    const field = at < 0 ? line : line.slice(0, at);
    const value = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
    if (field === "event") found.event = value;
    else if (field === "id") found.id = value;
    else if (field === "data") data.push(value);
  }
  if (data.length === 0) return null;  // a comment, sent to keep the line open
  found.data = JSON.parse(data.join("\n"));
  return found;
}
