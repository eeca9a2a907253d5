// Chat beside search over an index. Everything that comes from a model, a document or a user enters the page as text
// (textContent), never as markup.

const at = (id) => document.getElementById(id);
const turns = []; // {role, content}
let running = null; // AbortController of the reply that is being written
let key = "";

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const reply = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal });
  if (reply.status === 401) at("key").hidden = false;
  if (!reply.ok) {
    const told = await reply.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered ${reply.status}`);
  }
  return reply;
}

// The objects of a stream of server-sent events, until [DONE].
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended early");
    kept += value;
    const parts = kept.split("\n\n");
    kept = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      yield piece;
    }
  }
}

function follow(box) {
  // keep the end in sight, unless the reader has scrolled up
  if (box.scrollHeight - box.scrollTop - box.clientHeight < 80) box.scrollTop = box.scrollHeight;
}

function writing(on) {
  at("send").disabled = on;
  at("stop").hidden = !on;
}

async function send(text) {
  const box = at("turns");
  box.querySelector(".hint")?.remove();
  turns.push({ role: "user", content: text });
  box.append(element("div", "turn user", text));
  const shown = element("div", "turn assistant writing");
  box.append(shown);
  box.scrollTop = box.scrollHeight;
  running = new AbortController();
  writing(true);
  let written = "";
  try {
    const body = { messages: turns, stream: true, temperature: 0 };
    for await (const piece of events(await call("v1/chat/completions", body, running.signal))) {
      written += piece.choices[0]?.delta.content ?? "";
      shown.textContent = written;
      follow(box);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      const told = element("div", "wrong", error.message);
      shown.after(told);
      told.scrollIntoView();
    }
  } finally {
    shown.classList.remove("writing");
    if (written) turns.push({ role: "assistant", content: written });
    else {
      turns.pop();
      shown.remove();
    }
    running = null;
    writing(false);
  }
}

function source(found) {
  const row = element("li", "");
  const head = element("div", "head");
  head.append(element("span", "name", found.title || found.id), element("span", "score", found.score.toFixed(3)));
  row.append(head, element("div", "text", found.text));
  row.addEventListener("click", () => row.classList.toggle("open"));
  return row;
}

async function ask(question) {
  const answer = at("answer");
  const text = element("div", "");
  answer.replaceChildren(text);
  answer.hidden = false;
  answer.classList.remove("wrong");
  text.className = "writing";
  at("sources").replaceChildren();
  at("search-hint").textContent = "";
  at("ask").disabled = true;
  try {
    const body = { question, index: at("index").value, stream: true };
    for await (const piece of events(await call("v1/rag", body))) {
      if (piece.object === "rag.sources") at("sources").replaceChildren(...piece.sources.map(source));
      else if (piece.object === "rag.chunk") text.textContent += piece.delta;
      else {
        const { prompt_tokens: read, prompt_tokens_details: details } = piece.usage;
        answer.append(element("div", "hint", `${read} tokens read, ${details.cached_tokens} of them from stored states`));
      }
    }
  } catch (error) {
    answer.classList.add("wrong");
    text.textContent = error.message;
  } finally {
    text.className = "";
    at("ask").disabled = false;
  }
}

async function connect() {
  try {
    const [model] = (await (await call("v1/models")).json()).data;
    at("key").hidden = true;
    at("model").textContent = model.id;
    at("index").replaceChildren(...model.indexes.map((name) => element("option", "", name)));
    at("ask").disabled = at("question").disabled = !model.indexes.length;
    at("index").hidden = model.indexes.length < 2;
    at("search-hint").textContent = model.indexes.length
      ? "Documents are found by their embeddings and then answered from."
      : "This server has no index. Start it with grit serve --index FOLDER.";
  } catch (error) {
    at("model").textContent = error.message;
  }
}

at("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("message").value.trim();
  if (!text || running) return;
  at("message").value = "";
  send(text);
});
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("chat").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  at("turns").replaceChildren();
  at("message").focus();
});
at("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (question && !at("ask").disabled) ask(question);
});
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key-value").value.trim();
  connect();
});
connect();
