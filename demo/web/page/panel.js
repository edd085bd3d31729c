// Shows the state of the demo's programs, which the supervisor sends.

const MODES = ["presence", "plain"];
const LANGUAGES = ["C", "Go", "Python"];
const number = new Intl.NumberFormat("en");

const $ = (id) => document.getElementById(id);

let state = null;
const waiting = new Set();

/** Calls `onState` for each state, and `onLost` when the supervisor does not answer. */
export function follow(onState, onLost) {
  const source = new EventSource("/state");
  source.onmessage = (event) => {
    state = JSON.parse(event.data);
    onLost(false);
    onState(state);
    for (const check of waiting) check();
  };
  source.onerror = () => onLost(true);
}

/** Waits until the state fulfils a condition. */
export function until(condition) {
  return new Promise((resolve) => {
    const check = () => {
      if (!state || !condition(state)) return;
      waiting.delete(check);
      resolve(state);
    };
    waiting.add(check);
    check();
  });
}

/** Presses a button of the supervisor. */
export async function act(action, parameters = {}) {
  const response = await fetch(`/do/${action}?${new URLSearchParams(parameters)}`, { method: "POST" });
  if (!response.ok) throw new Error(await response.text());
}

export const workersOf = (state, mode) => state.workers.filter((worker) => worker.mode === mode);
export const total = (state, mode, figure) => workersOf(state, mode).reduce((sum, worker) => sum + worker[figure], 0);
export const formatCount = (value) => number.format(value);
export const formatSeconds = (us) => `${(us / 1e6).toFixed(2)} s`;

let selected = "presence";

/** Chooses whether the workers with nats-presence or those with plain NATS are shown. */
export function select(mode) {
  selected = mode;
  document.body.dataset.mode = mode;
  if (state) render(state);
}

export function build() {
  for (const language of LANGUAGES) {
    const box = $("worker").content.firstElementChild.cloneNode(true);
    box.id = `worker-${language}`;
    box.querySelector(".language").textContent = language;
    const kill = box.querySelector("button");
    kill.setAttribute("aria-label", `Kill the worker in ${language}`);
    kill.onclick = () => act("kill-worker", { mode: selected, worker: language });
    $("workers").append(box);
  }
  document.body.dataset.mode = selected;
}

export function render(state) {
  set($("hero-saved"), formatCount(total(state, "presence", "not_computed")));
  set($("hero-wasted"), formatCount(total(state, "plain", "wasted")));
  set($("gateway-language"), `in ${state.gateway.language}`);
  const processes = Object.fromEntries(state.processes.map((process) => [process.name, process]));
  showAlive($("gateway"), processes.gateway, state.gateway.frozen);
  showAlive($("nats-server"), processes["nats-server"]);
  set($("freeze-gateway"), state.gateway.frozen ? "Thaw" : "Freeze");
  for (const worker of workersOf(state, selected)) {
    const box = $(`worker-${worker.language}`);
    showAlive(box, processes[`${selected} ${worker.language}`]);
    for (const figure of ["running", "sent", "not_computed", "wasted"]) {
      set(box.querySelector(`.${figure}`), formatCount(worker[figure]));
    }
    set(box.querySelector(".cpu"), formatSeconds(worker.cpu_us));
    box.classList.toggle("busy", worker.running > 0);
  }
  renderStops(state.stops);
  renderLog(state.log);
}

function showAlive(box, process, frozen = false) {
  box.classList.toggle("dead", !process.alive);
  box.classList.toggle("frozen", frozen);
  const word = frozen ? "frozen" : process.alive ? "alive" : "dead";
  const restarts = process.restarts ? `, restarted ${process.restarts}×` : "";
  set(box.querySelector(".alive"), `${word}, pid ${process.pid}${restarts}`);
}

const units = (ms) => (ms < 1000 ? `${ms} ms` : `${ms / 1000} s`);

function renderStops({ limits_ms: limits, ...counts }) {
  const body = $("stops");
  while (body.rows.length < limits.length + 1) {
    const n = body.rows.length;
    const row = body.insertRow();
    const label = document.createElement("th");
    label.scope = "row";
    label.textContent = n < limits.length ? `below ${units(limits[n])}` : `${units(limits[n - 1])} or more`;
    row.append(label);
    for (const mode of MODES) {
      const cell = row.insertCell();
      cell.className = mode;
      cell.append(document.createElement("span"), document.createElement("b"));
    }
  }
  const most = Math.max(1, ...MODES.flatMap((mode) => counts[mode]));
  [...body.rows].forEach((row, n) =>
    MODES.forEach((mode, column) => {
      const [bar, text] = row.cells[column + 1].children;
      bar.style.width = `${(counts[mode][n] / most) * 100}%`;
      set(text, counts[mode][n] || "");
    }),
  );
}

let shown = 0;

function renderLog(log) {
  for (const [id, text] of log) {
    if (id <= shown) continue;
    shown = id;
    const item = document.createElement("li");
    item.textContent = text;
    $("log").prepend(item);
    $("no-log").hidden = true;
  }
  while ($("log").children.length > 60) $("log").lastChild.remove();
}

function set(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}
