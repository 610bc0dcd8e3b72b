//! `capture:` of `agent.yaml`.

use std::fmt;
use std::net::{Ipv6Addr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use vmesh_capture::Spec;
use vmesh_capture::spec::{DeadMan, Inbound, InboundCapture, Outbound, OutboundCapture};
use vmesh_model::node;
use vmesh_model::text::Time;

/// The settings of transparent capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureSettings {
    /// The configured part. [`super::desired`] adds what control planes and workloads contribute.
    pub spec: Spec,
    pub confirm: ConfirmSettings,
    /// The path of vmesh-net's socket.
    pub socket: PathBuf,
}

impl CaptureSettings {
    pub fn outbound(&self) -> bool {
        self.spec.outbound.capture != OutboundCapture::Off
    }

    pub fn inbound(&self) -> bool {
        self.spec.inbound.capture != InboundCapture::Off
    }

    /// Returns what control planes are told about capture on this node.
    pub fn report(&self) -> node::NodeCapture {
        node::NodeCapture {
            outbound: match self.spec.outbound.capture {
                OutboundCapture::Off => None,
                OutboundCapture::Vip => Some(node::OutboundCapture::Vip),
                OutboundCapture::Addresses => Some(node::OutboundCapture::Addresses),
                OutboundCapture::All => Some(node::OutboundCapture::All),
            },
            inbound: match self.spec.inbound.capture {
                InboundCapture::Off => None,
                InboundCapture::Redirect => Some(node::InboundCapture::Redirect),
                InboundCapture::Tproxy => Some(node::InboundCapture::Tproxy),
            },
            without_ipv6: !has_ipv6(self.outbound() || self.inbound()),
        }
    }
}

/// Reports whether programs of this host can use IPv6, and, if connections are captured, whether they can listen on `::1`. With
/// `ipv6.disable=1` the kernel has no IPv6; with `net.ipv6.conf.lo.disable_ipv6=1` it has no `::1`.
fn has_ipv6(captures: bool) -> bool {
    let address = if captures { Ipv6Addr::LOCALHOST } else { Ipv6Addr::UNSPECIFIED };
    UdpSocket::bind((address, 0)).is_ok()
}

/// Interval at which IPv6 is checked.
const LOOKS_EVERY: Duration = Duration::from_secs(3);
/// Number of equal checks in a row that make a change. An interface that is being reconfigured has no address for a moment.
const LOOKS: usize = 2;

impl CaptureSettings {
    /// Waits until the host gains or loses IPv6. Envoy's listeners depend on it, since Envoy rejects a listener with an address that it
    /// cannot bind. The control planes were told the old state, so the agent must then start again.
    pub async fn until_ipv6_changes(&self) {
        let captures = self.outbound() || self.inbound();
        if !captures {
            std::future::pending::<()>().await;
        }
        until_changed(|| has_ipv6(captures), LOOKS_EVERY).await;
    }
}

async fn until_changed(look: impl Fn() -> bool, every: Duration) {
    let before = look();
    let mut others = 0;
    while others < LOOKS {
        tokio::time::sleep(every).await;
        others = if look() == before { 0 } else { others + 1 };
    }
}

/// Writes a summary, such as `outbound addresses, 5 % of new connections; inbound redirect of 8080`.
impl fmt::Display for CaptureSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (outbound, inbound) = (&self.spec.outbound, &self.spec.inbound);
        match outbound.capture {
            OutboundCapture::Off => f.write_str("outbound off"),
            OutboundCapture::Vip => f.write_str("outbound virtual addresses"),
            OutboundCapture::Addresses => {
                write!(f, "outbound addresses, {} % of new connections", outbound.percent.get())
            }
            OutboundCapture::All => {
                write!(f, "outbound everything, {} % of new connections", outbound.percent.get())
            }
        }?;
        let ports: Vec<_> = inbound.ports.iter().map(ToString::to_string).collect();
        match inbound.capture {
            InboundCapture::Off => f.write_str("; inbound off"),
            InboundCapture::Redirect => write!(f, "; inbound redirect of {}", ports.join(", ")),
            InboundCapture::Tproxy => write!(f, "; inbound tproxy of {}", ports.join(", ")),
        }
    }
}

/// The confirmation of a change of capture: who confirms, and the deadline.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConfirmSettings {
    pub by: Confirmer,
    pub within: Time,
}

impl Default for ConfirmSettings {
    fn default() -> Self {
        ConfirmSettings { by: Confirmer::default(), within: Time(Duration::from_secs(60)) }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Confirmer {
    /// The agent's own probes confirm.
    #[default]
    Probes,
    /// An operator confirms with `vmeshctl capture confirm`.
    Operator,
}

/// The fields of `capture:`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CaptureFields {
    pub(crate) outbound: CaptureMode<Outbound>,
    pub(crate) inbound: CaptureMode<Inbound>,
    dead_man: DeadMan,
    confirm: ConfirmSettings,
    socket: PathBuf,
}

impl Default for CaptureFields {
    fn default() -> Self {
        CaptureFields {
            outbound: CaptureMode::default(),
            inbound: CaptureMode::default(),
            dead_man: DeadMan::default(),
            confirm: ConfirmSettings::default(),
            socket: vmesh_net::SOCKET.into(),
        }
    }
}

impl CaptureFields {
    /// Returns the settings. Contradictions are passed to `problem`, with the field.
    pub(crate) fn complete(&self, mut problem: impl FnMut(&str, &str)) -> CaptureSettings {
        let mut spec = Spec { dead_man: self.dead_man, ..Spec::default() };
        if let CaptureMode::Transparent(outbound) = &self.outbound {
            spec.outbound = (**outbound).clone();
            if spec.outbound.capture == OutboundCapture::Off {
                problem(
                    "capture.outbound",
                    "says neither `vip`, `addresses` nor `all`: what is to be captured?",
                );
            }
            if !(spec.outbound.vips.is_empty() && spec.outbound.addresses.is_empty()) {
                problem("capture.outbound", "has `vips` or `addresses`: these come from the control plane");
            }
        }
        if let CaptureMode::Transparent(inbound) = &self.inbound {
            spec.inbound = (**inbound).clone();
            if spec.inbound.capture == InboundCapture::Off {
                problem("capture.inbound", "says neither `redirect` nor `tproxy`: how is it to be captured?");
            }
            if !spec.inbound.ports.is_empty() {
                problem("capture.inbound", "has `ports`: these are the workloads'");
            }
        }
        if !(5..=3600).contains(&self.confirm.within.0.as_secs()) {
            problem("capture.confirm", "is `within` less than 5s or more than 1h");
        }
        CaptureSettings { spec, confirm: self.confirm.clone(), socket: self.socket.clone() }
    }
}

/// The mode of one direction: `off`, `explicit`, `transparent`, or a map for transparent capture with settings.
#[derive(Debug, Default)]
pub(crate) enum CaptureMode<T> {
    Off,
    #[default]
    Explicit,
    Transparent(Box<T>),
}

/// The settings that a bare `transparent` stands for: the least intrusive ones.
pub(crate) trait TransparentDefault {
    const EXAMPLE: &'static str;
    fn transparent_default() -> Self;
}

impl TransparentDefault for Outbound {
    const EXAMPLE: &'static str = "{capture: addresses, percent: 5}";
    fn transparent_default() -> Self {
        Outbound { capture: OutboundCapture::Vip, ..Outbound::default() }
    }
}

impl TransparentDefault for Inbound {
    const EXAMPLE: &'static str = "{capture: tproxy}";
    fn transparent_default() -> Self {
        Inbound { capture: InboundCapture::Redirect, ..Inbound::default() }
    }
}

impl<'de, T: TransparentDefault + Deserialize<'de>> Deserialize<'de> for CaptureMode<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CaptureModeVisitor<T>(std::marker::PhantomData<T>);

        impl<'de, T: TransparentDefault + Deserialize<'de>> Visitor<'de> for CaptureModeVisitor<T> {
            type Value = CaptureMode<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a capture mode: `off`, `explicit`, `transparent`, or a map as {}", T::EXAMPLE)
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<CaptureMode<T>, E> {
                // In YAML 1.1 `off` is the boolean `false`, and some tools write it that way.
                if on {
                    Err(de::Error::invalid_value(de::Unexpected::Bool(on), &self))
                } else {
                    Ok(CaptureMode::Off)
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<CaptureMode<T>, E> {
                match text {
                    "off" => Ok(CaptureMode::Off),
                    "explicit" => Ok(CaptureMode::Explicit),
                    "transparent" => Ok(CaptureMode::Transparent(Box::new(T::transparent_default()))),
                    other => Err(E::custom(format!(
                        "`{other}` is not a capture mode: `off`, `explicit`, `transparent`, or a map as {}",
                        T::EXAMPLE
                    ))),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CaptureMode<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
                    .map(|how| CaptureMode::Transparent(Box::new(how)))
            }
        }

        deserializer.deserialize_any(CaptureModeVisitor(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn ipv6_that_goes_for_a_moment_is_no_change_and_one_that_stays_away_is() {
        let looks = Cell::new(0);
        let until = async |has: fn(u32) -> bool| {
            looks.set(0);
            let look = || {
                looks.set(looks.get() + 1);
                has(looks.get())
            };
            until_changed(look, Duration::from_millis(1)).await;
            looks.get()
        };
        assert_eq!(until(|look| look < 5).await, 6);
        assert_eq!(until(|look| look == 3 || look > 7).await, 9, "gained");
        assert_eq!(until(|look| look != 4 && look < 10).await, 11, "away for one look");
    }
}
