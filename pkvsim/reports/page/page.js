// The page of a whatif: distributions, bars and figures over the run, redrawn when a policy is switched on or off.

const shown = new Set(data.policies.map(policy => policy.name));
const visible = () => data.policies.filter(policy => shown.has(policy.name));

function distribution(id, {log: logX, lines: curves}, label) {
  const lines = visible().filter(policy => curves[policy.name][0].length);
  const all = lines.flatMap(policy => curves[policy.name][0]);
  const element = document.getElementById(id);
  if (!all.length) { element.textContent = "No request has one."; return; }
  const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
  const [unit, scale] = unitOf(high);
  const room = low === high ? low * 0.1 || 1e-9 : 0;
  drawLines(element, {
    lines: lines.map(policy => {
      const [xs, ys] = curves[policy.name];
      return {...policy, xs: xs.map(x => x * scale), ys};
    }),
    xRange: [(logX ? low : 0) * scale, (high + room) * scale], yRange: [0, 100], logX,
    xLabel: `${label}, ${unit}`, yLabel: "requests at or below, %",
    hover: (x, y) => ({across: true, lines: [`${y.toFixed(1)} % of the requests within`, ...padded(lines.map(policy => {
      const [xs, ys] = curves[policy.name], at = ys.findIndex(share => share >= y);
      return [policy.name, seconds(xs[at < 0 ? xs.length - 1 : at])];
    }))]}),
  });
}

function overTheRun(metric) {
  const {edges_s: edges, figures} = data.run, [unit, scale] = unitOf(edges[edges.length - 1]);
  const middles = edges.slice(1).map((edge, at) => (edge + edges[at]) / 2 * scale), lines = visible();
  const values = lines.map(policy => figures[policy.name][metric]);
  const high = values.flat().reduce((a, b) => Math.max(a, b ?? 0), 0);
  drawLines(document.getElementById("run"), {
    lines: lines.map((policy, at) => ({...policy, xs: middles, ys: values[at]})),
    xRange: [edges[0] * scale, edges[edges.length - 1] * scale], yRange: [0, high * 1.04 || 1],
    logX: false, width: 1180,
    xLabel: `time from the first arrival, ${unit}`, yLabel: metric,
    hover: x => {
      const bin = Math.min(middles.length - 1, Math.max(0, edges.findIndex(edge => edge * scale > x) - 1));
      const rows = lines.map((policy, at) => [policy.name, number(values[at][bin])]);
      return {lines: [`${number(x)} ${unit}: ${metric}`, ...padded(rows)]};
    },
  });
}

function draw() {
  distribution("ttft", data.ttft_s, "time to first token");
  distribution("tpot", data.tpot_s, "time per output token");
  const policies = visible(), total = name => Object.values(data.parts_s[name]).reduce((a, b) => a + b, 0);
  const [unit, scale] = unitOf(Math.max(0, ...policies.map(policy => total(policy.name))));
  const bars = (values, colours) => policies.map(({name}) => (
    {name, parts: Object.entries(values[name]).map(([label, value]) => [label, value, colours[label]])}));
  drawBars(document.getElementById("parts"), {
    rows: bars(data.parts_s, data.part_colours), scale, unit: `GPU time, ${unit}`, text: seconds,
  });
  drawBars(document.getElementById("routes"), {
    rows: bars(data.routes, data.route_colours), scale: 1, unit: "decode steps",
    text: count => `${count.toLocaleString("en")} steps`,
  });
  overTheRun(document.getElementById("metric").value);
  for (const cell of document.querySelectorAll("[data-column]")) cell.hidden = !shown.has(cell.dataset.column);
}

toggles("policies", data.policies, shown, draw);
for (const metric of data.run.metrics) document.getElementById("metric").append(new Option(metric));
document.getElementById("metric").addEventListener("change", event => overTheRun(event.target.value));
draw();
