// A second tab, to be closed: it asks for three streams as soon as it knows the gateway.

import { setAddress } from "./gateway.js";
import { show } from "./streams.js";

const settings = Object.fromEntries(new URLSearchParams(location.search));
const source = new EventSource("/state");
source.onmessage = (event) => {
  source.close();
  setAddress(JSON.parse(event.data).gateway.url);
  for (let n = 0; n < 3; n++) show(settings);
};
