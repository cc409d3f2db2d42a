"use strict";

SwaggerUIBundle({
    url: "openapi.json",  // relative to the page, as its other addresses: a proxy may have removed a path prefix
    dom_id: "#page",
    deepLinking: true,
    displayRequestDuration: true,
    validatorUrl: null,  // the default sends the address of the document to a public server
});

// ---- what Swagger UI leaves out for screen readers and the keyboard ----

const page = document.getElementById("page");

// Returns what a select chooses, by the place where it stands.
function nameOf(select) {
    const parameter = select.closest("tr[data-param-name]")?.dataset.paramName;
    if (parameter) return parameter;
    const status = select.closest("tr.response")?.dataset.code;
    const what = select.closest(".examples-select") ? "Example" : "Media type";
    return status ? `${what} of the response ${status}` : `${what} of the body`;
}

function complete() {
    isWaiting = false;
    for (const select of page.querySelectorAll("select:not([aria-label], [aria-labelledby])")) {
        if (!select.labels.length) select.setAttribute("aria-label", nameOf(select));
    }
    for (const field of page.querySelectorAll("textarea:not([aria-label], [aria-labelledby])")) {
        if (!field.labels.length) field.setAttribute("aria-label", nameOf(field).replace(/^Media type/, "Text"));
    }
    // The button that opens an operation contains a link to it. The button does the same, also to the address.
    for (const link of page.querySelectorAll(".opblock-summary-control a[href]")) link.removeAttribute("href");
    // No heading has the second level.
    for (const heading of page.querySelectorAll(":is(h3, h4):not(.info *, [aria-level])")) {
        heading.setAttribute("aria-level", heading.matches("h3, .models > h4") ? "2" : "3");
    }
    page.querySelector(".information-container")?.setAttribute("role", "banner");
}

let isWaiting = false;

new MutationObserver(() => {
    if (!isWaiting) requestAnimationFrame(complete); // once for all changes of a frame
    isWaiting = true;
}).observe(page, { childList: true, subtree: true });
