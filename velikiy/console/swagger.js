"use strict";

SwaggerUIBundle({
    url: "openapi.json",  // relative to the page, as its other addresses: a proxy may have removed a path prefix
    dom_id: "#page",
    deepLinking: true,
    displayRequestDuration: true,
    validatorUrl: null,  // the default sends the address of the document to a public server
});
