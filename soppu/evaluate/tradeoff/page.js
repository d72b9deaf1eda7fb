// Two comforts; the page says all without them: a box at the point, and a search among users.
const box = document.getElementById("box");
for (const point of document.querySelectorAll("g.point")) {
  const told = point.querySelector("title").textContent;
  point.querySelector("title").remove();
  point.setAttribute("aria-label", told);
  const show = () => {
    const at = point.querySelector("circle").getBoundingClientRect();
    box.textContent = told;
    box.hidden = false;
    const left = Math.min(at.right + 10, innerWidth - box.offsetWidth - 12);
    box.style.left = Math.max(8, left) + scrollX + "px";
    box.style.top = at.bottom + 8 + scrollY + "px";
  };
  const hide = () => { box.hidden = true; };
  point.addEventListener("mouseenter", show);
  point.addEventListener("focus", show);
  point.addEventListener("mouseleave", hide);
  point.addEventListener("blur", hide);
}
const search = document.getElementById("search");
search.hidden = false;
search.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  for (const user of document.querySelectorAll("details.user")) {
    user.hidden = !user.dataset.name.toLowerCase().includes(wanted);
  }
});
