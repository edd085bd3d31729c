// Runs the same load with nats-presence and with plain NATS, and compares what it cost.

import { ask } from "./gateway.js";
import { act, formatCount, formatSeconds, total, until } from "./panel.js";

const READERS = 6;
const ROUNDS = 4;
const LENGTH = 120;
const PAUSE_MS = Number(new URLSearchParams(location.search).get("pause") ?? 40);
const LEAVE_AFTER = 30;

const $ = (id) => document.getElementById(id);
const results = {};

export async function run(mode, { transport, worker, prompt }) {
  const buttons = [$("load-presence"), $("load-plain")];
  buttons.forEach((button) => (button.disabled = true));
  try {
    say("Waiting for the streams that still run.");
    await until((state) => total(state, mode, "running") === 0);
    await act("reset", { mode });
    const began = performance.now();
    let left = 0;
    const question = { mode, worker, length: LENGTH, pause: PAUSE_MS, prompt };
    const read = async () => {
      for (let round = 0; round < ROUNDS; round++) {
        await readSome(transport, question);
        say(`${++left} of ${READERS * ROUNDS} answers were left.`);
      }
    };
    await Promise.all(Array.from({ length: READERS }, read));
    say("All clients have left. Waiting until the workers are idle.");
    // The figures of a worker come every 100 ms, and with the end of each stream.
    const state = await until(
      (state) => total(state, mode, "running") === 0 && total(state, mode, "streams") >= READERS * ROUNDS,
    );
    results[mode] = { ...figures(state, mode), seconds: (performance.now() - began) / 1000 };
    showResults();
    say(`Done with ${mode === "plain" ? "plain NATS" : "nats-presence"}.`);
  } catch (error) {
    say(`It failed: ${error.message}.`);
  } finally {
    buttons.forEach((button) => (button.disabled = false));
  }
}

/** Reads the first messages of an answer, and leaves. */
function readSome(transport, question) {
  return new Promise((resolve, reject) => {
    let count = 0;
    const stream = ask(
      transport,
      question,
      () => {
        if (++count !== LEAVE_AFTER) return;
        stream.leave();
        resolve();
      },
      (error) => reject(new Error(error ?? "a stream ended early")),
      "load-", // not to be logged one by one
    );
  });
}

function figures(state, mode) {
  const [computed, wasted, cpu] = ["computed", "wasted", "cpu_us"].map((figure) => total(state, mode, figure));
  return { computed, wasted, percent: (wasted / computed) * 100, cpu };
}

const formats = {
  computed: formatCount,
  wasted: formatCount,
  percent: (value) => `${value.toFixed(1)} %`,
  cpu: formatSeconds,
  seconds: (value) => `${value.toFixed(1)} s`,
};

function showResults() {
  for (const row of $("comparison").rows) {
    const figure = row.dataset.figure;
    ["presence", "plain"].forEach((mode, n) => {
      if (results[mode]) row.cells[n + 1].textContent = formats[figure](results[mode][figure]);
    });
  }
  const { presence, plain } = results;
  if (!presence || !plain) return;
  $("verdict").textContent =
    `For the same reading, plain NATS computed ${formatCount(plain.computed - presence.computed)} messages more ` +
    `and used ${formatSeconds(plain.cpu - presence.cpu)} more CPU time ` +
    `(${(plain.cpu / presence.cpu).toFixed(1)} times as much).`;
}

function say(text) {
  $("load-status").textContent = text;
}
