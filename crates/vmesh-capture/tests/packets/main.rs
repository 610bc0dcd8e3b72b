//! Tests with real packets: where connections end up under the rules of nftables and of both kinds of
//! iptables. The hosts are network namespaces; the tools and the kernel are real.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

/// Defines one test for each backend.
macro_rules! with_every_backend {
    ($($(#[$attribute:meta])* async fn $name:ident($vm:ident: Vm) $body:block)+) => {$(
        mod $name {
            use super::*;

            async fn check($vm: Vm) $body

            #[tokio::test]
            async fn by_nftables() {
                check(Vm::new(BackendKind::Nft)).await;
            }

            #[tokio::test]
            async fn by_iptables() {
                check(Vm::new(BackendKind::IptablesNft)).await;
            }

            #[tokio::test]
            async fn by_legacy_iptables() {
                check(Vm::new(BackendKind::IptablesLegacy)).await;
            }
        }
    )+};
}

mod any;
mod cgroup;
mod facts;
mod inbound;
mod outbound;
mod removal;
mod vm;
