"use strict";

SwaggerUIBundle({
    url: "/openapi.json",
    dom_id: "#page",
    deepLinking: true,
    displayRequestDuration: true,
    validatorUrl: null,  // the default sends the address of the document to a public server
});
