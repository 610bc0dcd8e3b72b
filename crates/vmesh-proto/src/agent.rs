//! vmesh's own messages between control plane and agent, which Envoy never receives.
//!
//! The types are written by hand, in the form that prost generates from this definition:
//!
//! ```text
//! package vmesh.agent.v1;
//! message Destination {
//!   message Endpoint { string address = 1; bool capture = 2; bool out_of_service = 3; }
//!   enum OnLoss { UNSPECIFIED = 0; OPEN = 1; CLOSED = 2; }
//!   string service = 1;
//!   uint32 port = 2;
//!   string virtual_v4 = 3;
//!   string virtual_v6 = 4;
//!   repeated Endpoint endpoints = 5;
//!   bool endpoints_on_port = 6;
//!   optional uint32 percent = 7;
//!   OnLoss on_loss = 8;
//! }
//! message Refusals {
//!   repeated Refusal refusals = 1;
//!   bool others_taken = 2;
//! }
//! message Refusal { string name = 1; string version = 2; string reason = 3; bool removal = 4; }
//! ```
//!
//! Agents and control planes of different versions exchange these messages. So a field keeps its meaning, the number of a removed
//! field is not reused, and a reader skips unknown fields.

use prost::{Message, Name};

/// The addresses at which a service is reached when clients do not connect to Envoy. The resource has the name of the service.
#[derive(Clone, PartialEq, Message)]
pub struct Destination {
    #[prost(string, tag = "1")]
    pub service: String,
    /// The port at the virtual addresses. 0: the service has no port and no virtual address yet.
    #[prost(uint32, tag = "2")]
    pub port: u32,
    /// `240.17.3.9`; empty if there is none.
    #[prost(string, tag = "3")]
    pub virtual_v4: String,
    /// `fd76:6d65:7368::1`; empty if there is none.
    #[prost(string, tag = "4")]
    pub virtual_v6: String,
    #[prost(message, repeated, tag = "5")]
    pub endpoints: Vec<destination::Endpoint>,
    /// True if every endpoint listens on `port`: a host that is out of the mesh can then use the endpoints' addresses instead of the
    /// virtual addresses.
    #[prost(bool, tag = "6")]
    pub endpoints_on_port: bool,
    /// The share of new connections to real addresses that is captured, 0 to 100; the host's own default if left out.
    #[prost(uint32, optional, tag = "7")]
    pub percent: Option<u32>,
    /// The fate of captured connections after the dead-man timer has expired.
    #[prost(enumeration = "destination::OnLoss", tag = "8")]
    pub on_loss: i32,
}

pub mod destination {
    use prost::{Enumeration, Message};

    #[derive(Clone, PartialEq, Message)]
    pub struct Endpoint {
        /// `10.0.1.11:8080` or `[2001:db8::1]:8080`.
        #[prost(string, tag = "1")]
        pub address: String,
        /// True if a listener exists for connections to this endpoint: `outbound|10.0.1.11:8080`.
        #[prost(bool, tag = "2")]
        pub capture: bool,
        /// True if the endpoint is unhealthy or drains, so that it should get no new connections.
        #[prost(bool, tag = "3")]
        pub out_of_service: bool,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
    #[repr(i32)]
    pub enum OnLoss {
        /// The host's own default.
        Unspecified = 0,
        /// Connections bypass Envoy.
        Open = 1,
        /// Connections fail.
        Closed = 2,
    }
}

impl Name for Destination {
    const NAME: &'static str = "Destination";
    const PACKAGE: &'static str = "vmesh.agent.v1";

    fn type_url() -> String {
        "type.googleapis.com/vmesh.agent.v1.Destination".to_owned()
    }
}

/// The resources that Envoy rejected, of the type of the NACK. The agent puts them into `error_detail.details`. A NACK without them has
/// only Envoy's message.
#[derive(Clone, PartialEq, Message)]
pub struct Refusals {
    #[prost(message, repeated, tag = "1")]
    pub refusals: Vec<Refusal>,
    /// True if Envoy accepted all other resources of the response.
    #[prost(bool, tag = "2")]
    pub others_taken: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct Refusal {
    #[prost(string, tag = "1")]
    pub name: String,
    /// The version that the control plane sent.
    #[prost(string, tag = "2")]
    pub version: String,
    /// Envoy's message.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// True if Envoy rejected the removal of the resource.
    #[prost(bool, tag = "4")]
    pub removal: bool,
}

impl Name for Refusals {
    const NAME: &'static str = "Refusals";
    const PACKAGE: &'static str = "vmesh.agent.v1";

    fn type_url() -> String {
        "type.googleapis.com/vmesh.agent.v1.Refusals".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_refusals_stay_what_they_are() {
        let refusal =
            Refusal { name: "a".to_owned(), version: "1".to_owned(), reason: "no".to_owned(), removal: true };
        let refusals = Refusals { refusals: vec![refusal], others_taken: true };
        let expected = b"\x0a\x0c\x0a\x01a\x12\x011\x1a\x02no\x20\x01\x10\x01";
        assert_eq!(refusals.encode_to_vec(), expected);
    }

    /// The numbers are a contract with agents and control planes of other versions.
    #[test]
    fn the_bytes_of_a_destination_stay_what_they_are() {
        let endpoint =
            destination::Endpoint { address: "10.0.1.11:80".to_owned(), capture: true, out_of_service: true };
        let destination = Destination {
            service: "orders".to_owned(),
            port: 80,
            virtual_v4: "240.0.0.1".to_owned(),
            virtual_v6: "fd00::1".to_owned(),
            endpoints: vec![endpoint],
            endpoints_on_port: true,
            percent: Some(0),
            on_loss: destination::OnLoss::Closed.into(),
        };
        let bytes = destination.encode_to_vec();
        let expected = b"\x0a\x06orders\x10\x50\x1a\x09240.0.0.1\x22\x07fd00::1\
            \x2a\x12\x0a\x0c10.0.1.11:80\x10\x01\x18\x01\x30\x01\x38\x00\x40\x02";
        assert_eq!(bytes, expected);
        // Of a newer version: one more field, of which this one knows nothing.
        let newer = [&bytes[..], b"\x7a\x03new"].concat();
        assert_eq!(Destination::decode(&newer[..]).unwrap(), destination);
        assert_eq!(Destination::type_url(), "type.googleapis.com/vmesh.agent.v1.Destination");
    }
}
