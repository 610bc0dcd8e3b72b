//! A thin client of Consul's HTTP API: blocking queries, KV, registration.
