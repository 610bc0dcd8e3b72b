//! TLS contexts of mesh connections. Certificates and trust bundles come by SDS, which the node's agent answers.

use std::collections::BTreeMap;

use vmesh_model::{Protocol, ServiceName};
use vmesh_proto::envoy::config::cluster::v3::cluster::TransportSocketMatch;
use vmesh_proto::envoy::config::core::v3::transport_socket::ConfigType;
use vmesh_proto::envoy::config::core::v3::{Metadata, TransportSocket};
use vmesh_proto::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::common_tls_context::{
    CombinedCertificateValidationContext, ValidationContextType,
};
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
    SubjectAltNameMatcher, TlsParameters, UpstreamTlsContext, downstream_tls_context,
};
use vmesh_proto::envoy::r#type::matcher::v3::StringMatcher;
use vmesh_proto::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use vmesh_proto::google::protobuf::{Any, Struct, Value, value};
use vmesh_proto::{any, boolean, uint32};

use crate::cluster::ads;

/// The name of the secret with the roots that a node trusts.
const TRUST_BUNDLE: &str = "trust_bundle";
/// The name of the secret with the certificate that a node shows to the services that it calls.
const CALLER: &str = "caller";
/// The metadata by which Envoy chooses the transport socket of an endpoint.
const SOCKET_METADATA: &str = "envoy.transport_socket_match";
/// The key in that metadata of endpoints that are called by mTLS.
const MTLS: &str = "mtls";

/// The inputs of a cluster's TLS context, on the caller's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CallerTls {
    pub(crate) service: ServiceName,
    pub(crate) trust_domain: std::sync::Arc<str>,
    /// The workload whose certificate is shown. `None`: the node's default.
    pub(crate) certificate: Option<ServiceName>,
}

/// Returns the SPIFFE id of a service.
pub(crate) fn service_id(trust_domain: &str, service: &ServiceName) -> String {
    format!("spiffe://{trust_domain}/service/{service}")
}

/// Returns the server name by which an mTLS connection names the service that it is for.
pub(crate) fn server_name(service: &ServiceName) -> String {
    service.as_str().to_ascii_lowercase()
}

/// Returns the transport sockets of a cluster: mTLS for endpoints with [`mtls_metadata`], and plaintext for all
/// others. The called service is identified by its SPIFFE id, not only by the issuer of its certificate.
pub(crate) fn upstream_sockets(tls: &CallerTls, protocol: Protocol) -> Vec<TransportSocketMatch> {
    let secret = tls.certificate.as_ref().map_or_else(|| CALLER.to_owned(), workload_secret);
    let alpn: &[&str] = match protocol {
        Protocol::Http => &["http/1.1"],
        Protocol::Http2 | Protocol::Grpc => &["h2"],
        _ => &[],
    };
    let id = exact(service_id(&tls.trust_domain, &tls.service));
    let context = UpstreamTlsContext {
        common_tls_context: Some(common(secret, id, alpn)),
        sni: server_name(&tls.service),
        // A resumed session would skip the verification of the certificate.
        max_session_keys: Some(uint32(0)),
        ..UpstreamTlsContext::default()
    };
    vec![
        TransportSocketMatch {
            name: MTLS.to_owned(),
            r#match: Some(is_mtls()),
            transport_socket: Some(socket("envoy.transport_sockets.tls", any(&context))),
        },
        TransportSocketMatch {
            name: "plaintext".to_owned(),
            r#match: Some(Struct::default()),
            transport_socket: Some(socket("envoy.transport_sockets.raw_buffer", any(&RawBuffer {}))),
        },
    ]
}

/// Returns the metadata of an endpoint that is called by mTLS.
pub(crate) fn mtls_metadata() -> Metadata {
    Metadata {
        filter_metadata: BTreeMap::from([(SOCKET_METADATA.to_owned(), is_mtls())]),
        ..Metadata::default()
    }
}

/// Returns the transport socket of a workload's filter chain. Callers must show a certificate of the trust domain.
pub(crate) fn downstream_socket(
    service: &ServiceName,
    trust_domain: &str,
    protocol: Protocol,
) -> TransportSocket {
    let alpn: &[&str] = if protocol.is_http() { &["h2", "http/1.1"] } else { &[] };
    let of_the_mesh = StringMatcher {
        match_pattern: Some(MatchPattern::Prefix(format!("spiffe://{trust_domain}/"))),
        ..StringMatcher::default()
    };
    let context = DownstreamTlsContext {
        common_tls_context: Some(common(workload_secret(service), of_the_mesh, alpn)),
        require_client_certificate: Some(boolean(true)),
        // A resumed session would skip the verification of the certificate.
        disable_stateful_session_resumption: true,
        session_ticket_keys_type: Some(
            downstream_tls_context::SessionTicketKeysType::DisableStatelessSessionResumption(true),
        ),
        ..DownstreamTlsContext::default()
    };
    socket("envoy.transport_sockets.tls", any(&context))
}

fn workload_secret(service: &ServiceName) -> String {
    format!("workload|{service}")
}

fn common(certificate: String, peer: StringMatcher, alpn: &[&str]) -> CommonTlsContext {
    let matcher = SubjectAltNameMatcher {
        san_type: SanType::Uri.into(),
        matcher: Some(peer),
        ..SubjectAltNameMatcher::default()
    };
    let validation = CombinedCertificateValidationContext {
        default_validation_context: Some(CertificateValidationContext {
            match_typed_subject_alt_names: vec![matcher],
            ..CertificateValidationContext::default()
        }),
        validation_context_sds_secret_config: Some(secret(TRUST_BUNDLE.to_owned())),
        ..CombinedCertificateValidationContext::default()
    };
    CommonTlsContext {
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: TlsProtocol::TlSv12.into(),
            tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
            ..TlsParameters::default()
        }),
        tls_certificate_sds_secret_configs: vec![secret(certificate)],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(validation)),
        alpn_protocols: alpn.iter().map(|protocol| (*protocol).to_owned()).collect(),
        ..CommonTlsContext::default()
    }
}

fn secret(name: String) -> SdsSecretConfig {
    SdsSecretConfig { name, sds_config: Some(ads()) }
}

fn socket(name: &str, config: Any) -> TransportSocket {
    TransportSocket { name: name.to_owned(), config_type: Some(ConfigType::TypedConfig(config)) }
}

fn is_mtls() -> Struct {
    let value = Value { kind: Some(value::Kind::BoolValue(true)) };
    Struct { fields: BTreeMap::from([(MTLS.to_owned(), value)]) }
}

/// Returns a matcher of exactly `text`.
pub(crate) fn exact(text: String) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Exact(text)), ..StringMatcher::default() }
}
