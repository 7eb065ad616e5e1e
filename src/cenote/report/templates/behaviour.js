"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const remembered = (() => {
    try { return localStorage.getItem("cenote-theme"); } catch { return null; }
  })();
  if (remembered === "dark" || remembered === "light") root.dataset.theme = remembered;

  function theme() {
    const button = document.querySelector(".theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const show = () => { button.textContent = dark() ? "Light mode" : "Dark mode"; };
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("cenote-theme", root.dataset.theme); } catch { /* a page from a file may not store */ }
      show();
    });
    system.addEventListener("change", show);
    show();
  }

  function sorting() {
    const table = document.querySelector(".board");
    const status = document.getElementById("sorted");
    for (const button of all("thead button", table)) {
      button.addEventListener("click", () => {
        const header = button.closest("th");
        const { key, first } = button.dataset;
        const other = { ascending: "descending", descending: "ascending" };
        const order = header.hasAttribute("aria-sort") ? other[header.getAttribute("aria-sort")] : first;
        for (const th of all("thead th", table)) th.removeAttribute("aria-sort");
        header.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const value = (body) => body.getAttribute(`data-${key}`);
        const compare = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          return sign * (key === "method" ? x.localeCompare(y) : x - y);
        };
        const byRank = (a, b) => a.dataset.rank - b.dataset.rank;
        table.append(...[...table.tBodies].sort((a, b) => compare(a, b) || byRank(a, b)));
        status.textContent = `Sorted by ${button.textContent.trim()}, ${order}`;
      });
    }
    for (const button of all(".open", table)) {
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") !== "true";
        button.setAttribute("aria-expanded", String(open));
        document.getElementById(button.getAttribute("aria-controls")).hidden = !open;
      });
    }
  }

  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  function pairs() {
    const table = document.querySelector(".pairs");
    if (!table) return;
    const readout = document.getElementById("pair");
    const names = all("thead th", table).map((th) => th.title);
    const rows = [...table.tBodies[0].rows].map((row) => all("td", row));
    const place = (cell) => [cell.parentNode.sectionRowIndex, cell.cellIndex - 1];
    const say = (cell) => {
      const [i, j] = place(cell);
      if (!cell.dataset.p) { readout.textContent = names[i]; return; }
      const difference = cell.firstChild.textContent;
      readout.textContent =
        `${names[i]} minus ${names[j]}: ${difference}${table.dataset.unit} (${cell.dataset.i}), adjusted p ${cell.dataset.p}`;
    };
    rows[0][0].tabIndex = 0;
    table.addEventListener("mouseover", (event) => {
      const cell = event.target.closest("tbody td");
      if (cell) say(cell);
    });
    table.addEventListener("focusin", (event) => {
      for (const cell of all("td[tabindex='0']", table)) cell.tabIndex = -1;
      event.target.tabIndex = 0;
      say(event.target);
    });
    table.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      const [i, j] = place(event.target);
      const next = rows[i + step[0]]?.[j + step[1]];
      event.preventDefault();
      if (next) next.focus();
    });
  }

  function items() {
    const tabs = all("[role='tab']");
    const choose = (chosen) => {
      for (const tab of tabs) {
        const on = tab === chosen;
        tab.setAttribute("aria-selected", String(on));
        tab.tabIndex = on ? 0 : -1;
        document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
      }
    };
    tabs.forEach((tab, number) => {
      tab.addEventListener("click", () => choose(tab));
      tab.addEventListener("keydown", (event) => {
        const to = { ArrowRight: number + 1, ArrowLeft: number - 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        const next = tabs[(to + tabs.length) % tabs.length];
        choose(next);
        next.focus();
      });
    });
    const switches = all(".bare-switch");
    for (const box of switches) {
      box.addEventListener("change", () => {
        for (const other of switches) other.checked = box.checked;
        document.getElementById("looks").classList.toggle("bare", box.checked);
      });
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    theme();
    sorting();
    pairs();
    items();
  });
})();
