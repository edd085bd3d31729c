import { setAddress } from "./gateway.js";
import { run } from "./load.js";
import { act, build, follow, render, select } from "./panel.js";
import { leaveAll, openCount, setOnChange, show } from "./streams.js";

const $ = (id) => document.getElementById(id);
const form = $("ask");
const settings = () => Object.fromEntries(new FormData(form));

build();
let frozen = false;
follow(
  (state) => {
    setAddress(state.gateway.url);
    frozen = state.gateway.frozen;
    document.body.dataset.ready = state.gateway.ready;
    render(state);
  },
  (lost) => ($("lost").hidden = !lost),
);

form.onsubmit = (event) => {
  event.preventDefault();
  const chosen = settings();
  for (let n = 0; n < Number(chosen.count); n++) show(chosen);
  $("streams-title").scrollIntoView({ block: "nearest" }); // on a phone they are far below
};
for (const radio of form.elements.mode) radio.onchange = () => select(settings().mode);
select(settings().mode); // a reload keeps the choice

setOnChange(() => {
  $("own-streams").textContent = openCount();
  $("leave-all").disabled = openCount() === 0;
  $("no-streams").hidden = $("streams").children.length > 0;
});
$("leave-all").disabled = true;
$("leave-all").onclick = leaveAll;

$("kill-gateway").onclick = () => act("kill-gateway");
$("freeze-gateway").onclick = () => act(frozen ? "thaw-gateway" : "freeze-gateway");
$("restart-server").onclick = () => act("restart-server");

let tab = null;
$("tab").onclick = () => {
  if (tab && !tab.closed) {
    tab.close();
    return;
  }
  const { transport, mode, worker, prompt } = settings();
  const question = new URLSearchParams(location.search); // with this page's length and pause
  for (const [name, value] of Object.entries({ transport, mode, worker, prompt })) question.set(name, value);
  tab = window.open(`tab.html?${question}`, "_blank");
};
setInterval(() => {
  const text = tab && !tab.closed ? "Close the tab" : "Open a tab";
  if ($("tab").textContent !== text) $("tab").textContent = text;
}, 200);

for (const mode of ["presence", "plain"]) {
  $(`load-${mode}`).onclick = () => {
    leaveAll();
    form.elements.mode.value = mode;
    select(mode);
    run(mode, settings());
  };
}
