for (const button of document.querySelectorAll("button.copy")) {
  const code = button.parentElement.querySelector("code");
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
for (const figure of document.querySelectorAll("figure.umap")) {
  for (const item of figure.querySelectorAll("li[data-class]")) {
    const paths = figure.querySelectorAll(`path[data-class="${item.dataset.class}"]`);
    const set = (on) => {
      figure.classList.toggle("one", on);
      for (const path of paths) path.classList.toggle("on", on);
    };
    item.addEventListener("mouseenter", () => set(true));
    item.addEventListener("mouseleave", () => set(false));
  }
}
