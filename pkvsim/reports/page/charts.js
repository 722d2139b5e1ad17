"use strict";
// What every page's charts share: inline SVG drawn from the JSON in #data, buttons that switch lines, what the pointer
// tells. The page's own script follows and says what is drawn.

const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const WIDTH = 560, HEIGHT = 270, LEFT = 52, RIGHT = 12, TOP = 8, BOTTOM = 40;

const ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"};
const escape = text => String(text).replace(/[&<>"]/g, character => ENTITIES[character]);
const number = value => value === null ? "-" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
  : String(Number(value.toPrecision(3)));

// The unit that suits times up to `longest` seconds: [name, units per second].
function unitOf(longest) {
  for (const [limit, scale, unit] of [[1e-3, 1e6, "us"], [1, 1e3, "ms"], [600, 1, "s"], [10800, 1 / 60, "min"]])
    if (longest < limit) return [unit, scale];
  return ["h", 1 / 3600];
}

function seconds(value) {
  const [unit, scale] = unitOf(value);
  return `${number(value * scale)} ${unit}`;
}

function niceTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= raw * 0.999);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step)
    ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [], wide = Math.log10(high / low) > 2.2;
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of wide ? [1] : [1, 2, 5]) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(Number(tick.toPrecision(12)));
    }
  return ticks.length > 1 ? ticks : [low, high];
}

// Fills the element. lines: [{name, colour, dash, xs, ys}], ys may hold nulls; hover(x, y) -> {lines of text, across}.
// dots: also a dot at every point. bound: {y, text} of a line across. What lies above yRange is cut off.
function drawLines(element, {lines, xRange, yRange, logX, xLabel, yLabel, hover, width = WIDTH, dots, bound}) {
  const [x0, x1] = xRange, [y0, y1] = yRange;
  const project = logX ? Math.log : value => value, span = project(x1) - project(x0) || 1;
  const toX = x => LEFT + (project(x) - project(x0)) / span * (width - LEFT - RIGHT);
  const toY = y => HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  const label = escape(`${yLabel} over ${xLabel}`), low = HEIGHT - BOTTOM;
  const parts = [`<svg viewBox="0 0 ${width} ${HEIGHT}" role="img" aria-label="${label}">`,
    `<clipPath id="${element.id}-clip"><rect x="${LEFT}" y="${TOP - 2}" width="${width - LEFT - RIGHT}" ` +
      `height="${low - TOP + 4}"/></clipPath>`];
  for (const tick of niceTicks(y0, y1, 5))
    parts.push(`<line class="gridline" x1="${LEFT}" x2="${width - RIGHT}" y1="${toY(tick)}" y2="${toY(tick)}"/>`,
      `<text x="${LEFT - 6}" y="${toY(tick) + 4}" text-anchor="end">${number(tick)}</text>`);
  for (const tick of logX ? logTicks(x0, x1) : niceTicks(x0, x1, width / 90))
    parts.push(`<line class="gridline" x1="${toX(tick)}" x2="${toX(tick)}" y1="${TOP}" y2="${low}"/>`,
      `<text x="${toX(tick)}" y="${low + 15}" text-anchor="middle">${number(tick)}</text>`);
  parts.push(`<line class="axis" x1="${LEFT}" x2="${width - RIGHT}" y1="${low}" y2="${low}"/>`,
    `<text x="${(LEFT + width - RIGHT) / 2}" y="${HEIGHT - 6}" text-anchor="middle">${escape(xLabel)}</text>`,
    `<text transform="translate(11 ${(TOP + low) / 2}) rotate(-90)" text-anchor="middle">${escape(yLabel)}</text>`);
  lines.forEach((line, order) => {
    // Policies that agree lie on each other: later lines are thinner, so that earlier ones show beside them.
    const thick = Math.max(1.2, 3.4 - 0.45 * order);
    let path = "", pen = "M";
    line.xs.forEach((x, at) => {
      if (line.ys[at] === null) { pen = "M"; return; }
      path += `${pen}${toX(x).toFixed(1)} ${toY(line.ys[at]).toFixed(1)}`;
      pen = "L";
    });
    const clip = `clip-path="url(#${element.id}-clip)"`;
    parts.push(`<path class="line" data-name="${escape(line.name)}" d="${path}" stroke="${line.colour}" ` +
      `stroke-width="${thick}" stroke-dasharray="${line.dash}" ${clip}/>`);
    if (dots) line.xs.forEach((x, at) => {
      if (line.ys[at] === null || line.ys[at] > y1) return;
      parts.push(`<circle cx="${toX(x).toFixed(1)}" cy="${toY(line.ys[at]).toFixed(1)}" r="2.6" ` +
        `fill="${line.colour}"/>`);
    });
  });
  if (bound)
    parts.push(`<line class="bound" x1="${LEFT}" x2="${width - RIGHT}" y1="${toY(bound.y)}" y2="${toY(bound.y)}"/>`,
      `<text class="bound" x="${LEFT + 6}" y="${toY(bound.y) - 5}">${escape(bound.text)}</text>`);
  parts.push(`<line class="cursor"/></svg>`);
  element.innerHTML = parts.join("");
  const svg = element.firstChild, cursor = svg.querySelector(".cursor");
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect(), scale = width / box.width;
    const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
    if (px < LEFT || px > width - RIGHT || py < TOP || py > low) return hide(cursor);
    const x = project(x0) + (px - LEFT) / (width - LEFT - RIGHT) * span;
    const text = hover(logX ? Math.exp(x) : x, y0 + (low - py) / (low - TOP) * (y1 - y0));
    const ends = text.across ? {x1: LEFT, x2: width - RIGHT, y1: py, y2: py} : {x1: px, x2: px, y1: TOP, y2: low};
    for (const [name, value] of Object.entries(ends)) cursor.setAttribute(name, value);
    cursor.style.visibility = "visible";
    show(event, text.lines);
  });
  svg.addEventListener("mouseleave", () => hide(cursor));
}

// rows: [{name, parts: [[label, value, colour]]}]; every row's bar is as long as its sum. text(value) formats one.
function drawBars(element, {rows, scale, unit, text}) {
  const height = 30, width = WIDTH, left = 150, bottom = 38;
  const sums = rows.map(row => row.parts.reduce((sum, part) => sum + part[1], 0));
  const most = Math.max(...sums, 0) || 1, full = rows.length * height + bottom;
  const toX = value => left + value / most * (width - left - RIGHT);
  const parts = [`<svg viewBox="0 0 ${width} ${full}" role="img" aria-label="stacked bars, ${escape(unit)}">`];
  for (const tick of niceTicks(0, most * scale, 6)) {
    const x = toX(tick / scale);
    parts.push(`<line class="gridline" x1="${x}" x2="${x}" y1="0" y2="${full - bottom}"/>`,
      `<text x="${x}" y="${full - bottom + 14}" text-anchor="middle">${number(tick)}</text>`);
  }
  rows.forEach((row, at) => {
    parts.push(`<text x="${left - 8}" y="${at * height + 19}" text-anchor="end">${escape(row.name)}</text>`);
    let begin = 0;
    for (const [label, value, colour] of row.parts) {
      const wide = toX(begin + value) - toX(begin), share = sums[at] ? value / sums[at] : 0;
      const told = `${row.name}, ${label}\n${text(value)}, ${(share * 100).toFixed(1)} %`;
      if (value > 0)
        parts.push(`<rect class="bar" data-name="${escape(row.name)}" data-tip="${escape(told)}" fill="${colour}" ` +
          `x="${toX(begin)}" y="${at * height + 3}" width="${wide}" height="${height - 6}"/>`);
      if (wide > 34)
        parts.push(`<text class="${dark(colour) ? "light" : ""}" x="${toX(begin) + wide / 2}" ` +
          `y="${at * height + 19}" text-anchor="middle" pointer-events="none">${Math.round(share * 100)}%</text>`);
      begin += value;
    }
  });
  const middle = (left + width - RIGHT) / 2;
  parts.push(`<text x="${middle}" y="${full - 4}" text-anchor="middle">${escape(unit)}</text></svg>`);
  const labels = new Map(rows.flatMap(row => row.parts.map(([label, , colour]) => [label, colour])));
  parts.push(`<div class="legend">`);
  for (const [label, colour] of labels) parts.push(`<span><i style="background:${colour}"></i>${escape(label)}</span>`);
  element.innerHTML = parts.join("") + "</div>";
  for (const bar of element.querySelectorAll(".bar")) {
    bar.addEventListener("mousemove", event => show(event, bar.dataset.tip.split("\n")));
    bar.addEventListener("mouseleave", () => hide());
  }
}

function dark(colour) {
  const [red, green, blue] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  return 0.3 * red + 0.59 * green + 0.11 * blue < 130;
}

function show(event, lines) {
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
}

function hide(cursor) {
  tip.hidden = true;
  if (cursor) cursor.style.visibility = "hidden";
}

function padded(rows) {
  const wide = Math.max(0, ...rows.map(row => row[0].length));
  return rows.map(([name, value]) => `${name.padEnd(wide)}  ${value}`);
}

// A button in the element for each of lines [{name, colour, dash}] that puts it into the set or takes it out.
function toggles(id, lines, shown, redraw) {
  for (const {name, colour, dash} of lines) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.name = name;
    button.setAttribute("aria-pressed", String(shown.has(name)));
    const sample = `<line x1="0" x2="26" y1="4" y2="4" stroke="${colour}" stroke-width="3" stroke-dasharray="${dash}"/>`;
    button.innerHTML = `<svg width="26" height="8">${sample}</svg>${escape(name)}`;
    button.addEventListener("click", () => {
      shown.has(name) ? shown.delete(name) : shown.add(name);
      button.setAttribute("aria-pressed", String(shown.has(name)));
      redraw();
    });
    document.getElementById(id).append(button);
  }
}
