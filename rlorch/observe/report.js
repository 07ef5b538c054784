// The values under the pointer, for every figure.chart, from its data-chart attribute (see charts.py).
const unit = (v, base, names) => { let i = 0; while (Math.abs(v) >= 999.5 && i < names.length - 1) { v /= base; i++; }
  return +v.toPrecision(3) + " " + names[i]; };
const text = { number: v => Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4)),
  percent: v => +(100 * v).toPrecision(3) + "%", bytes: v => unit(v, 1000, ["B", "kB", "MB", "GB", "TB"]),
  seconds: v => Math.abs(v) < 1 ? +(1000 * v).toPrecision(3) + " ms" : +v.toPrecision(3) + " s" };
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor"), [low, high, left, right] = data.x;
  let tip = null;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = low + (at - left) / (right - left) * (high - low);
    const near = data.series.map(s => s.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const step = near.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)[0];
    const px = left + (high > low ? (step - low) / (high - low) : .5) * (right - left);
    cursor.setAttribute("x1", px); cursor.setAttribute("x2", px); cursor.setAttribute("visibility", "visible");
    if (!tip) { tip = figure.appendChild(document.createElement("div")); tip.className = "tip"; }
    tip.replaceChildren(Object.assign(document.createElement("div"), { className: "muted", textContent: "step " + Math.round(step) }));
    data.series.forEach((s, i) => { const row = tip.appendChild(document.createElement("div")); row.className = "key";
      row.appendChild(document.createElement("i")).className = s.colour;
      row.append(s.name + "  ", Object.assign(document.createElement("b"), { textContent: text[data.kind](near[i][1]) })); });
    const inside = event.clientX - figure.getBoundingClientRect().left, flip = inside > figure.clientWidth / 2;
    tip.style.left = flip ? "auto" : inside + 16 + "px"; tip.style.right = flip ? figure.clientWidth - inside + 16 + "px" : "auto";
    tip.style.top = box.top - figure.getBoundingClientRect().top + 6 + "px"; });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); tip?.remove(); tip = null; });
}
