// What the page does beyond being read: one crosshair through all timelines, and saving the result it carries.
// Without it nothing is missing but that.
"use strict";

for (const panel of document.querySelectorAll(".panel")) {
  const plots = [...panel.querySelectorAll(".plot.time")].map(made);
  for (const plot of plots) {
    plot.svg.addEventListener("pointermove", (event) => {
      const box = plot.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * plot.svg.viewBox.baseVal.width;
      const at = ((x - plot.x0) / (plot.x1 - plot.x0)) * plot.seconds;
      if (at < 0 || at > plot.seconds) return leave(plots);
      for (const other of plots) show(other, at);
    });
    plot.svg.addEventListener("pointerleave", () => leave(plots));
  }
}

function made(figure) {
  const [x0, x1, seconds, bin] = figure.dataset.frame.split(" ").map(Number);
  const traces = [...figure.querySelectorAll("path[data-values]")].map((path) => path.dataset.values.split(" "));
  return {
    x0, x1, seconds, bin, traces,
    svg: figure.querySelector("svg"),
    cross: figure.querySelector(".cross"),
    told: [...figure.querySelectorAll(".key b")],
  };
}

function show(plot, at) {
  const place = Math.floor(at / plot.bin);
  const x = plot.x0 + ((plot.x1 - plot.x0) * Math.min((place + 0.5) * plot.bin, plot.seconds)) / plot.seconds;
  plot.cross.setAttribute("x1", x);
  plot.cross.setAttribute("x2", x);
  plot.cross.style.visibility = "visible";
  plot.traces.forEach((values, i) => {
    plot.told[i].textContent = (values[place] || "–").replaceAll("_", " ");
  });
}

function leave(plots) {
  for (const plot of plots) {
    plot.cross.style.visibility = "hidden";
    for (const told of plot.told) told.textContent = "";
  }
}

const data = document.getElementById("data");
const save = document.getElementById("save");
if (data && save) {
  save.hidden = false;
  save.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([data.textContent], { type: "application/json" }));
    link.download = save.dataset.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
document.documentElement.dataset.ready = "yes";
