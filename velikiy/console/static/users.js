// The view of all users.

import { empty } from "./states.js";

export async function show(main, { t }) {
  main.append(empty(t("users")));
}
