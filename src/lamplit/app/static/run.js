// Run: the curves of the tuning run, its recall, what was locked, and a description of model and store.
import { $, ask, attempt, facts, make } from "./common.js";

const RECALLS = [
  ["image_to_text/recall@1", "image → text @1", "#e69f00"],
  ["image_to_text/recall@5", "image → text @5", "#b0713c"],
  ["text_to_image/recall@1", "text → image @1", "#3f8fd2"],
  ["text_to_image/recall@5", "text → image @5", "#2a9d6f"],
];
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [420, 220, 46, 24, 10];

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function short(value) {
  if (value === 0) return "0";
  return Math.abs(value) < 0.001 || Math.abs(value) >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

// One panel: `lines` are [name, colour, [[step, value], ...]].
function panel(title, lines, range) {
  const all = lines.flatMap(([, , dots]) => dots);
  const steps = all.map(([step]) => step);
  const values = all.map(([, value]) => value);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = range ?? [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [low - 1, high + 1];
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - 10);
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${short(values[0])} at the start, ${short(values.at(-1))} at the end` });
  for (let i = 0; i <= 4; i++) {
    const value = low + ((high - low) * i) / 4;
    svg.append(draw("line", { class: "axis", x1: LEFT, x2: WIDTH - 10, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  svg.append(draw("text", { x: LEFT, y: HEIGHT - 6 }, `step ${first}`), draw("text", { x: WIDTH - 10, y: HEIGHT - 6, "text-anchor": "end" }, String(last)));
  for (const [, colour, dots] of lines) {
    svg.append(draw("polyline", { class: "curve", stroke: colour, points: dots.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") }));
    if (dots.length < 40) svg.append(...dots.map(([step, value]) => draw("circle", { cx: x(step), cy: y(value), r: 3, fill: colour })));
  }
  const legend = lines.length < 2 ? null : make("div", { className: "legend" }, ...lines.map(([name, colour]) => {
    const dot = make("i");
    dot.style.background = colour;
    return make("span", {}, dot, name);
  }));
  return make("figure", { className: "panel" }, make("h2", {}, title), svg, legend);
}

function table(head, rows) {
  const cells = (tag, values) => values.map((value) => (value instanceof Node ? value : make(tag, {}, value)));
  return make("table", {}, make("thead", {}, make("tr", {}, ...cells("th", head))), make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))));
}

function recallTable({ report }) {
  const rows = RECALLS.map(([key, name]) => {
    const values = ["start", "best", "last"].map((when) => report[when]?.[key]);
    const most = Math.max(...values.filter((value) => value !== undefined));
    return [name, ...values.map((value) => make("td", { className: value === most ? "best" : "" }, value === undefined ? "–" : value.toFixed(3)))];
  });
  return make("div", { className: "panel" }, make("h2", {}, "Held-out recall"), table(["", "at the start", "best", "last"], rows),
    make("p", { className: "quiet" }, `On ${report.held_out_captions} captions of ${report.held_out_pairs} pairs that were not trained on; the best step was ${report.best_step} of ${report.steps}.`));
}

function lockTable({ report }) {
  const rows = Object.entries(report.trains).map(([name, part]) => [name, make("td", { className: part.state }, part.state), part.parameters.toLocaleString("en")]);
  const [before, after] = [report.fingerprint_before, report.fingerprint_after];
  const proof = before && before === after
    ? `The image tower did not change: its fingerprint is ${before} before the first step and after the last.`
    : before && after ? `The image tower changed: its fingerprint was ${before} and is ${after}.` : "No image tower was open in this run.";
  return make("div", { className: "panel" }, make("h2", {}, `What was locked (mode ${report.mode})`), table(["", "", "parameters"], rows), make("p", { className: "quiet" }, proof));
}

function describe(title, values) {
  return make("div", { className: "panel" }, make("h2", {}, title), facts(make("dl"), values));
}

export function startRun(about) {
  let isThere = false;
  return async () => {
    if (isThere) return;
    isThere = true;
    const described = make("div", { className: "facts" }, describe("The model", { name: about.model, ...about.details.model }), describe("The store", { name: about.store, ...about.details.store }));
    $("run-body").replaceChildren(described);
    await attempt($("run-problem"), async () => {
      const run = await ask("run");
      const curves = [["Loss", "loss"], ["Learning rate", "lr"], ["Logit scale", "logit_scale"]]
        .map(([title, key]) => panel(title, [[title, "#e69f00", run.steps.map((line) => [line.step, line[key]])]]));
      const recall = RECALLS.map(([key, name, colour]) => [name, colour, run.held_out.filter((line) => key in line).map((line) => [line.step, line[key]])]);
      if (recall.some(([, , dots]) => dots.length)) curves.unshift(panel("Held-out recall", recall, [0, 1]));
      const { report } = run;
      const summary = `${report.text_tower} was tuned to read ${report.image_tower}: ${report.steps} steps on ${report.training_pairs.toLocaleString("en")} pairs in ${Math.round(report.seconds)} seconds.`;
      const shown = Object.fromEntries(Object.entries(run.settings).filter(([, value]) => value !== null));
      const settings = make("details", { className: "panel" }, make("summary", {}, "All settings"), facts(make("dl"), shown));
      $("run-body").replaceChildren(make("p", {}, summary), make("div", { className: "facts" }, recallTable(run), lockTable(run)), make("div", { className: "curves" }, ...curves), described, settings);
    });
  };
}
