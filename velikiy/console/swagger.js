"use strict";

// Swagger UI has dark colours, which its bundle without the top bar does not switch on.
const darkMode = matchMedia("(prefers-color-scheme: dark)");
const followSystem = () => document.documentElement.classList.toggle("dark-mode", darkMode.matches);
darkMode.addEventListener("change", followSystem);
followSystem();

SwaggerUIBundle({
    url: "openapi.json",  // relative to the page, as its other addresses: a proxy may have removed a path prefix
    dom_id: "#page",
    deepLinking: true,
    displayRequestDuration: true,
    validatorUrl: null,  // the default sends the address of the document to a public server
});
