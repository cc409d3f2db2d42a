// Sets the theme before the first paint, so that a dark page does not flash white. A plain script for that reason: a
// module runs after the paint. console.js changes the choice, which is "light" or "dark"; without one the page follows
// the system. Paper is light.
{
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paper = matchMedia("print");
  const apply = () => {
    let chosen = null;
    try {
      chosen = localStorage.getItem("theme");
    } catch {
      // The browser keeps nothing for this page.
    }
    const followed = dark.matches ? "dark" : "light";
    const theme = paper.matches ? "light" : chosen === "light" || chosen === "dark" ? chosen : followed;
    document.documentElement.dataset.bsTheme = theme;
    document.documentElement.classList.toggle("dark-mode", theme === "dark"); // for Swagger UI at /docs
  };
  apply();
  dark.addEventListener("change", apply);
  paper.addEventListener("change", apply);
  addEventListener("themechange", apply);
  addEventListener("storage", apply); // another tab has changed it
}
