// Shows streams as cards, in which words appear as they arrive.

import { ask } from "./gateway.js";

// The tests' streams are shorter or longer.
const parameters = new URLSearchParams(location.search);
const LENGTH = Number(parameters.get("length") ?? 120);
const PAUSE_MS = Number(parameters.get("pause") ?? 80);
const MAX_CARDS = 12;
/** A pause between two words that is worth mentioning. */
const LONG_PAUSE_MS = 600;

const open = new Set();
const list = document.getElementById("streams");

export let onChange = () => {};
export const setOnChange = (f) => (onChange = f);
export const openCount = () => open.size;
export const leaveAll = () => [...open].forEach((stream) => stream.leave());

/** Asks for a stream and shows it. `settings` has transport, mode, worker and prompt. */
export function show({ transport, mode, worker, prompt }) {
  const card = document.getElementById("stream").content.firstElementChild.cloneNode(true);
  const [title, button, words, status] = ["h3", "button", ".words", ".status"].map((s) => card.querySelector(s));
  let count = 0;
  let lastWord = 0;
  let longest = 0;

  const finish = (state, text) => {
    open.delete(stream);
    card.dataset.state = state;
    const pause = longest > LONG_PAUSE_MS ? ` Longest pause: ${(longest / 1000).toFixed(1)} s.` : "";
    status.textContent = `${text}${pause}`;
    if (document.activeElement === button) words.focus(); // the keyboard's place must not be lost
    button.hidden = true;
    onChange();
  };
  const onWord = (word) => {
    const now = performance.now();
    if (count++) longest = Math.max(longest, now - lastWord);
    lastWord = now;
    const span = document.createElement("span");
    span.textContent = `${word} `;
    words.append(span);
    words.scrollTop = words.scrollHeight;
    status.textContent = `${count} of ${LENGTH} messages`;
  };
  const onEnd = (error) =>
    error === null
      ? finish("complete", `All ${count} messages arrived.`)
      : finish("failed", `Failed after ${count} messages: ${error}.`);

  const question = { mode, worker, length: LENGTH, pause: PAUSE_MS, prompt };
  const asked = ask(transport, question, onWord, onEnd);
  const stream = {
    leave() {
      asked.leave();
      finish("left", `You left after ${count} of ${LENGTH} messages.`);
    },
  };
  open.add(stream);
  title.textContent = `Stream ${asked.name}`;
  const kind = document.createElement("small");
  kind.textContent = (transport === "ws" ? "WebSocket" : "SSE") + (mode === "plain" ? ", plain NATS" : "");
  title.append(" ", kind);
  card.dataset.mode = mode;
  card.dataset.state = "open";
  card.dataset.stream = asked.name;
  words.setAttribute("aria-label", `Words of stream ${asked.name}`);
  button.setAttribute("aria-label", `Leave stream ${asked.name}`);
  status.textContent = "Waiting for the first message";
  button.onclick = () => stream.leave();
  list.prepend(card);
  for (const old of [...list.children].slice(MAX_CARDS)) if (old.dataset.state !== "open") old.remove();
  onChange();
}
