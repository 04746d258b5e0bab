"use strict";
const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth - 8 ? x - 14 - box.width : x + 14;
  const top = y + 16 + box.height > innerHeight - 8 ? y - 12 - box.height : y + 16;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, top) + "px";
}

function hideTip() {
  tip.hidden = true;
}

for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const data = JSON.parse(svg.dataset.hover);
  const cross = svg.querySelector(".cross");
  let at = -1;
  const show = (index, y) => {
    at = Math.min(Math.max(index, 0), data.x.length - 1);
    const box = svg.getBoundingClientRect();
    cross.setAttribute("x1", data.x[at]);
    cross.setAttribute("x2", data.x[at]);
    cross.setAttribute("visibility", "visible");
    showTip(data.t[at], box.left + (data.x[at] * box.width) / data.w, y);
  };
  const hide = () => {
    cross.setAttribute("visibility", "hidden");
    hideTip();
  };
  const near = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) * data.w) / box.width;
    let best = 0;
    for (let i = 1; i < data.x.length; i++) {
      if (Math.abs(data.x[i] - x) < Math.abs(data.x[best] - x)) best = i;
    }
    show(best, event.clientY);
  };
  svg.addEventListener("pointermove", near);
  svg.addEventListener("pointerdown", near);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: data.x.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key], svg.getBoundingClientRect().top + 20);
  });
}

const names = ["log-prob", "value", "advantage", "weight version"];
let lit = null;

function light(token, x, y) {
  if (lit) lit.classList.remove("on");
  lit = token;
  if (!token) {
    hideTip();
    return;
  }
  token.classList.add("on");
  const facts = token.dataset.t.split("|").map((fact, i) => (fact === "" ? "" : names[i] + "  " + fact));
  showTip([JSON.stringify(token.textContent), ...facts.filter(Boolean)].join("\n"), x, y);
}

const episodes = document.getElementById("episodes");
for (const kind of ["pointerover", "pointerdown"]) {
  episodes.addEventListener(kind, (event) => {
    const token = event.target.closest("i[data-t]");
    if (token || lit) light(token, event.clientX, event.clientY);
  });
}
episodes.addEventListener("pointerleave", () => light(null));
addEventListener("scroll", () => light(null), { passive: true });

for (const button of document.querySelectorAll("[data-set]")) {
  button.addEventListener("click", () => {
    document.body.dataset.color = button.dataset.set;
    for (const other of document.querySelectorAll("[data-set]")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  });
}
for (const button of document.querySelectorAll("[data-fold]")) {
  button.addEventListener("click", () => {
    for (const episode of document.querySelectorAll("details.episode")) episode.open = Boolean(button.dataset.fold);
  });
}
