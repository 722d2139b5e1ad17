// The page of a capacity search: for each objective, latency over the rate of arrivals, a line a server.

const shown = new Set(data.servers.slice(0, data.shown_at_first).map(server => server.name));
const visible = () => data.servers.filter(server => shown.has(server.name));

function chart(objective) {
  const element = document.getElementById(objective.id), lines = visible();
  const rates = lines.flatMap(server => server.rates);
  if (!rates.length) { element.textContent = "No server is shown."; return; }
  const top = objective.bound_s * 2.5, [unit, scale] = unitOf(top);
  drawLines(element, {
    lines: lines.map(server => ({...server, xs: server.rates,
      ys: server.values_s[objective.name].map(value => value === null ? null : value * scale)})),
    xRange: [Math.min(...rates), Math.max(...rates)], yRange: [0, top * scale], logX: true, dots: true,
    bound: {y: objective.bound_s * scale, text: `objective: ${objective.text}`},
    xLabel: "requests per second to one replica (logarithmic)", yLabel: `${objective.name}, ${unit}`,
    hover: x => ({lines: [`near ${number(x)} requests/s: ${objective.name}`, ...padded(lines.map(server => {
      const at = nearest(server.rates, x), value = server.values_s[objective.name][at];
      return [server.name, `${value === null ? "-" : seconds(value)} at ${number(server.rates[at])}/s` +
        (server.kept[at] ? "" : ", missed")];
    }))]}),
  });
}

function nearest(rates, x) {
  let best = 0;
  rates.forEach((rate, at) => { if (Math.abs(Math.log(rate / x)) < Math.abs(Math.log(rates[best] / x))) best = at; });
  return best;
}

function draw() {
  for (const objective of data.objectives) chart(objective);
}

toggles("servers", data.servers, shown, draw);
draw();
