// First of all in a page: what goes wrong in it, and what its own policy had to stop.
const wrong = [];
addEventListener("error", (event) => wrong.push(event.message || "a picture"), true);
addEventListener("securitypolicyviolation", (event) => wrong.push(`policy: ${event.violatedDirective}`));
