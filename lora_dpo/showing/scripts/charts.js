// Draws the page's figures in the colours of its style, again when light, dark or print changes.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("lora-dpo-figures").textContent);
  const page = document.querySelector(".lora-dpo");
  const options = {
    displaylogo: false,
    responsive: true,
    modeBarButtons: [["toImage", "resetScale2d"]],
  };
  // A finger scrolls the page; a mouse zooms.
  const drag = matchMedia("(pointer: coarse)").matches ? false : "zoom";

  function coloured(value, style) {
    if (typeof value === "string") {
      const named = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return named ? style.getPropertyValue(named[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [key, coloured(item, style)]),
    );
  }

  function draw() {
    const style = getComputedStyle(page);
    for (const [key, figure] of Object.entries(figures)) {
      const place = document.getElementById(key);
      const layout = { ...coloured(figure.layout, style), dragmode: drag };
      Plotly.react(place, coloured(figure.data, style), layout, options);
    }
  }

  draw();
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", () => {
      draw();
      for (const key of Object.keys(figures)) Plotly.Plots.resize(document.getElementById(key));
    });
  }
})();
