// Streams from the gateway, over server-sent events or a WebSocket.

/** How the gateway knows this tab. */
const client = Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("-");

let address = "";
const counts = {};
let socket = null;

export function setAddress(value) {
  address = value;
}

/**
 * Asks for a stream. `question` has mode, worker, length, pause and prompt. `onWord(word)` is called for each message,
 * then `onEnd(error)` once, with null if the stream is complete. Returns its name and a function that leaves it.
 */
export function ask(transport, question, onWord, onEnd, prefix = "") {
  counts[prefix] = (counts[prefix] ?? 0) + 1;
  const name = prefix + counts[prefix];
  const query = new URLSearchParams({ ...question, stream: name });
  let open = true;
  const end = (error) => {
    if (open) onEnd(error);
    open = false;
  };
  const leave = (transport === "ws" ? askSocket : askEvents)(name, query, onWord, end);
  return {
    name,
    leave() {
      if (open) leave();
      open = false;
    },
  };
}

function askEvents(name, query, onWord, onEnd) {
  query.set("client", client);
  const source = new EventSource(`http://${address}/sse?${query}`);
  const end = (error) => {
    source.close(); // otherwise it would ask again
    onEnd(error);
  };
  source.onmessage = (event) => onWord(event.data);
  source.addEventListener("end", () => end(null));
  source.addEventListener("failure", (event) => end(event.data));
  source.onerror = () => end("the connection to the gateway is lost");
  return () => source.close();
}

function askSocket(name, query, onWord, onEnd) {
  socket ??= new Socket();
  const current = socket;
  current.streams.set(name, { onWord, onEnd });
  current.send(`ask ${query}`);
  return () => {
    current.streams.delete(name);
    current.send(`leave ${name}`);
  };
}

/** One WebSocket for all streams of this tab. */
class Socket {
  constructor() {
    this.streams = new Map();
    this.waiting = [];
    this.socket = new WebSocket(`ws://${address}/ws?client=${client}`);
    this.socket.onopen = () => {
      this.waiting.forEach((message) => this.socket.send(message));
      this.waiting = [];
    };
    this.socket.onmessage = (event) => this.handle(event.data);
    this.socket.onclose = () => {
      if (socket === this) socket = null;
      this.streams.forEach(({ onEnd }) => onEnd("the connection to the gateway is lost"));
      this.streams.clear();
    };
  }

  send(message) {
    if (this.socket.readyState === WebSocket.CONNECTING) this.waiting.push(message);
    else if (this.socket.readyState === WebSocket.OPEN) this.socket.send(message);
  }

  handle(message) {
    const [, kind, name, text] = message.match(/^(\S+) (\S+) ([^]*)$/);
    const stream = this.streams.get(name);
    if (!stream) return; // a word that was on its way when the stream was left
    if (kind === "message") {
      stream.onWord(text);
      return;
    }
    this.streams.delete(name);
    stream.onEnd(kind === "end" ? null : text);
  }
}
