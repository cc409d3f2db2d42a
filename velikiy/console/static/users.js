// The view of all users: search, order, pages by cursor, chosen rows, and the writes that user_writes.js makes.

import { badge } from "./badge.js";
import { announce, element, icon } from "./dom.js";
import { nextCursor, request } from "./api.js";
import { rights } from "./rights.js";
import { empty, explain, failed, loading } from "./states.js";
import { number, translator } from "./texts.js";
import { texts } from "./texts/users.js";
import { UserTable, openEdits } from "./user_table.js";

const t = translator(texts);

const PAGE_ROWS = 50;
const DEFAULT_SORT = "-id";
const SORT = /^-?(id|name|email|created_at)$/;
const TYPING_MS = 200; // a pause in typing after which a search begins
const SLOW_MS = 2000;

// The modules of actions are loaded after the first rows, which would wait for them.
const writes = () => import("./user_writes.js");
const edits = () => import("./user_edits.js");
const csv = () => import("./csv.js");
const download = () => import("./export.js");

// The chosen rows, by id. They stay chosen on other pages, and while another view is shown.
const chosen = new Map();

// A page of the list. Its place in history is the fragment (the order, the number of the page, and its cursor if the
// order is by values that are not personal) and history.state (the search, and the cursors of the pages before).
class Place {
  constructor(query) {
    const state = history.state?.users ?? {};
    const sort = query.get("sort") ?? "";
    this.sort = SORT.test(sort) ? sort : DEFAULT_SORT;
    this.q = state.q ?? "";
    this.cursors = state.cursors ?? [""];
    if (!state.cursors && query.get("cursor")) {
      // A link to a page: the cursors of the pages between the first one and this one are not known.
      const page = Math.min(Math.max(Number(query.get("page")) || 2, 2), 1e6);
      this.cursors = ["", ...Array(page - 2).fill(null), query.get("cursor")];
    }
  }

  get page() {
    return this.cursors.length;
  }

  get cursor() {
    return this.cursors.at(-1);
  }

  // Writes the place into the history of the browser.
  note({ isNew }) {
    const query = new URLSearchParams();
    if (this.sort !== DEFAULT_SORT) query.set("sort", this.sort);
    if (this.page > 1 && !/name|email/.test(this.sort) && !this.q) {
      query.set("page", this.page);
      query.set("cursor", this.cursor);
    }
    const fragment = `#/users${query.size ? `?${query}` : ""}`;
    // Cursors are long where the order is by name, and browsers limit the state: the last ones suffice to go back.
    const kept = this.cursors.map((cursor, index) => (index && index < this.page - 200 ? null : cursor));
    history[isNew ? "pushState" : "replaceState"]({ users: { q: this.q, cursors: kept } }, "", fragment);
  }
}

class UsersView {
  constructor(main, query, signal) {
    this.signal = signal;
    this.place = new Place(query);
    this.rows = null; // null: none were loaded yet
    this.next = "";
    this.total = null;
    this.loads = 0; // answers to older loads are dropped
    this.build(main);
    addEventListener("rightschange", () => this.drawRights(), { signal });
    addEventListener("userschange", () => this.load({ keepsFocus: true }), { signal });
  }

  build(main) {
    this.search = element("input", { type: "search", class: "form-control", id: "search", maxLength: 100,
      placeholder: t("search"), autocomplete: "off", spellcheck: false, value: this.place.q,
      "aria-label": t("search"), "aria-describedby": "search-problem", oninput: () => this.typed() });
    this.searchProblem = element("div", { class: "field-problem", id: "search-problem" });
    this.create = element("button", { type: "button", class: "btn btn-primary", id: "create",
      onclick: () => this.createUser() }, icon("plus"), t("create"));
    this.counter = element("p", { class: "count", id: "count" });
    this.badges = element("div", { class: "badges" });
    this.reload = element("button", { type: "button", class: "btn-quiet", "aria-label": t("reload"), title: t("reload"),
      onclick: () => this.load({ keepsFocus: true }) }, icon("reload"));
    this.bar = element("div", { class: "chosen-bar", role: "group", "aria-label": t("chosen_actions"), hidden: true });
    this.notice = element("div", { class: "notice", role: "alert", hidden: true });
    this.table = new UserTable({
      chosen,
      onsort: (sort) => this.go({ sort, cursors: [""] }),
      onchoose: () => this.drawBar(),
      onedit: (row, onend) => this.act(edits, ({ beginEdit }) => beginEdit(row, onend)),
      ondelete: (row) => this.act(writes, ({ deleteUser }) => deleteUser(row)),
    });
    this.area = element("div", { class: "surface users-area", "aria-busy": "true" }, loading());
    this.pager = element("nav", { class: "pager", "aria-label": t("pages") });
    main.append(
      element("div", { class: "view-head" },
        element("h1", {}, t("users")), this.counter,
        element("div", { class: "view-actions" },
          element("button", { type: "button", class: "btn btn-outline-secondary", id: "export",
            onclick: () => this.export() }, t("export")),
          this.create)),
      element("div", { class: "toolbar" },
        element("div", { class: "search" }, icon("search"), this.search),
        element("div", { class: "reads" }, this.badges, this.reload)),
      this.searchProblem, this.bar, this.notice, this.area, this.pager);
    this.drawRights();
    this.drawBar();
  }

  export() {
    const { q, sort } = this.place;
    const found = this.counted === q ? this.total : null;
    return this.act(download, ({ openExport }) => openExport({ q, sort, found }));
  }

  createUser() {
    return this.act(writes, ({ createUser }) => createUser());
  }

  // Runs an action when its module is there.
  async act(load, run) {
    const module = await load().catch(() => null);
    if (module) return run(module);
    this.warn(t("action_failed"), () => {
      this.notice.hidden = true;
      this.act(load, run);
    });
    return null;
  }

  // ---- where ----

  typed() {
    this.place.q = this.search.value.trim();
    this.place.cursors = [""];
    this.place.note({ isNew: false }); // each letter as a place of its own would bury the way back
    clearTimeout(this.typing);
    this.typing = setTimeout(() => {
      if (!this.signal.aborted) this.load();
    }, TYPING_MS);
  }

  go(change) {
    Object.assign(this.place, change);
    this.place.note({ isNew: true });
    this.load({ keepsFocus: true, scrolls: true });
  }

  // The person went back or forward.
  restore(query) {
    this.place = new Place(query);
    if (this.search.value.trim() !== this.place.q) this.search.value = this.place.q;
    this.load({ keepsFocus: true });
  }

  // ---- reads ----

  async load({ keepsFocus = false, scrolls = false } = {}) {
    const load = ++this.loads;
    this.loading?.abort();
    this.loading = new AbortController();
    const signal = AbortSignal.any([this.signal, this.loading.signal]);
    const { place } = this;
    const parameters = new URLSearchParams({ limit: PAGE_ROWS, sort: place.sort });
    const search = new URLSearchParams();
    if (place.cursor) parameters.set("cursor", place.cursor);
    if (place.q) {
      parameters.set("q", place.q);
      search.set("q", place.q);
    }
    this.area.setAttribute("aria-busy", "true");
    const slow = setTimeout(() => this.warn(t(this.rows?.length ? "slow_rows" : "slow")), SLOW_MS);
    const count = request("GET", `/users/count${search.size ? `?${search}` : ""}`, { signal });
    const answer = await request("GET", `/users?${parameters}`, { signal });
    clearTimeout(slow);
    if (load !== this.loads || answer.aborted) return;
    this.area.setAttribute("aria-busy", "false");
    this.drawProblem(answer);
    if (answer.ok) {
      if (this.counted !== place.q) { // the number of another search would be a wrong one
        this.total = this.countSource = null;
        this.drawCount();
      }
      this.rows = answer.body;
      this.next = nextCursor(answer.headers);
      this.listSource = answer.source;
      this.drawRows({ keepsFocus });
      if (scrolls) this.area.scrollIntoView({ block: "nearest" });
    }
    this.drawBadges();
    this.drawPager();
    const counted = await count;
    if (load !== this.loads || counted.aborted) return;
    this.total = counted.ok ? counted.body.count : null;
    this.counted = place.q;
    this.countSource = counted.source;
    this.drawCount();
    this.drawBadges();
    this.drawPager();
    if (answer.ok && !keepsFocus) announce(this.counter.textContent);
  }

  // ---- drawing ----

  drawProblem(answer) {
    const error = answer.ok ? null : answer.problem.errors?.find(({ field }) => field === "q");
    this.searchProblem.textContent = error ? t("search_problem") : "";
    this.search.classList.toggle("is-invalid", Boolean(error));
    if (answer.ok || error) {
      this.notice.hidden = true;
      return;
    }
    if (answer.status === 400 && this.place.cursor) {
      // A link with a cursor of another order, or of another service.
      this.place.cursors = [""];
      this.place.note({ isNew: false });
      this.load();
      return;
    }
    const retry = () => this.load({ keepsFocus: true });
    if (this.rows === null) {
      this.notice.hidden = true;
      this.area.replaceChildren(failed(answer.problem, retry));
    } else {
      this.warn(explain(answer.problem), retry); // the rows of before stay
    }
  }

  warn(text, retry = null) {
    this.notice.hidden = false;
    const again = element("button", { type: "button", class: "btn btn-sm btn-outline-secondary", onclick: retry },
      t("retry"));
    this.notice.replaceChildren(icon("alert"), element("span", {}, text), ...(retry ? [again] : []));
  }

  drawRows({ keepsFocus = false } = {}) {
    for (const row of this.rows) if (chosen.has(row.id)) chosen.set(row.id, row);
    if (this.rows.length || openEdits.size) {
      this.table.draw(this.rows, this.place.sort, { keepsFocus });
      if (this.table.element.parentNode !== this.area) this.area.replaceChildren(this.table.element);
    } else if (this.place.q) {
      this.area.replaceChildren(empty(t("nothing_found"), t("nothing_found_text"),
        element("button", { type: "button", class: "btn btn-outline-secondary", onclick: () => {
          this.search.value = "";
          this.typed();
          this.search.focus();
        } }, t("clear_search"))));
    } else if (this.place.page > 1) {
      this.area.replaceChildren(empty(t("page_empty"), "", element("button", { type: "button",
        class: "btn btn-outline-secondary", onclick: () => this.go({ cursors: [""] }) }, t("first"))));
    } else {
      this.area.replaceChildren(empty(t("no_users"), t("no_users_text"), rights().may_write &&
        element("button", { type: "button", class: "btn btn-primary", onclick: () => this.createUser() }, t("create")),
        element("a", { class: "btn btn-outline-secondary", href: "#/import" }, t("to_import"))));
    }
    this.drawBar();
  }

  drawCount() {
    if (this.total === null) this.counter.textContent = "";
    else this.counter.textContent = t(this.place.q ? "found" : "count", { count: this.total });
  }

  drawBadges() {
    const labelled = (label, source) => source?.tier &&
      element("span", { class: "read" }, element("span", { class: "read-label" }, label), badge(source));
    this.badges.replaceChildren(...[labelled(t("rows"), this.listSource), labelled(t("counted"), this.countSource)]
      .filter(Boolean));
  }

  drawPager() {
    if (!this.rows?.length) {
      this.pager.replaceChildren();
      return;
    }
    const { place } = this;
    const before = (place.page - 1) * PAGE_ROWS;
    const values = { from: number(before + 1), to: number(before + this.rows.length) };
    const text = this.total === null ? t("range", values) : t("range_of", { ...values, total: this.total });
    const focused = document.activeElement?.closest?.(".pager")?.contains(document.activeElement)
      ? document.activeElement.id : "";
    const button = (id, label, cursors, ...content) => element("button", { type: "button", id, disabled: !cursors,
      class: "btn btn-outline-secondary btn-sm", "aria-label": label, title: label,
      onclick: () => this.go({ cursors }) }, content);
    const previous = place.cursors.at(-2);
    this.pager.replaceChildren(
      element("span", { class: "range" }, text),
      button("page-first", t("first"), place.page > 1 && [""], t("first")),
      button("page-previous", t("previous"), typeof previous === "string" && place.cursors.slice(0, -1),
        icon("previous")),
      button("page-next", t("next"), this.next && [...place.cursors, this.next], icon("next")));
    if (focused) {
      const again = document.getElementById(focused);
      (again?.disabled ? this.pager.querySelector("button:not(:disabled)") : again)?.focus();
    }
  }

  drawRights() {
    const mayWrite = rights().may_write;
    this.create.disabled = !mayWrite;
    this.create.title = mayWrite ? "" : t("may_not_write");
    if (this.rows) this.drawRows({ keepsFocus: true });
  }

  drawBar() {
    const count = chosen.size;
    this.bar.hidden = !count;
    if (!count) {
      this.bar.replaceChildren();
      return;
    }
    const mayWrite = rights().may_write;
    const clear = () => {
      chosen.clear();
      this.table.drawChoice();
      this.drawBar();
      this.search.focus();
    };
    this.bar.replaceChildren(
      element("span", { class: "chosen-count" }, t("chosen", { count })),
      element("button", { type: "button", class: "btn btn-sm btn-outline-secondary", id: "export-chosen",
        onclick: () => this.act(csv, ({ saveCsv }) => saveCsv("users.csv", [...chosen.values()])) }, t("export_chosen")),
      element("button", { type: "button", class: "btn btn-sm btn-outline-danger", id: "delete-chosen",
        disabled: !mayWrite, title: mayWrite ? "" : t("may_not_write"), onclick: async () => {
          const gone = await this.act(writes, ({ deleteUsers }) => deleteUsers([...chosen.values()]));
          for (const id of gone ?? []) chosen.delete(id);
          this.drawBar();
        } }, icon("trash"), t("delete")),
      element("button", { type: "button", class: "btn btn-sm btn-outline-secondary", onclick: clear },
        t("clear_choice")));
  }
}

export async function show(main, { query, signal }) {
  const view = new UsersView(main, query, signal);
  await view.load();
  requestAnimationFrame(() => setTimeout(loadActions)); // after the rows are painted
  return ({ query: changed }) => view.restore(changed);
}

// Loads the actions of most visits, so that the first of them need not wait.
function loadActions() {
  writes().then(({ offerUndoAgain }) => offerUndoAgain(), () => {});
  edits().catch(() => {});
}
