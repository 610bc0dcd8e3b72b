//! The log of refused requests: one line of JSON on Envoy's standard output for each request that rules of access refuse, or
//! would refuse if they were enforced.

use std::collections::BTreeMap;

use vmesh_proto::any;
use vmesh_proto::boolean;
use vmesh_proto::envoy::config::accesslog::v3::access_log::ConfigType;
use vmesh_proto::envoy::config::accesslog::v3::access_log_filter::FilterSpecifier;
use vmesh_proto::envoy::config::accesslog::v3::{AccessLog, AccessLogFilter, MetadataFilter, OrFilter};
use vmesh_proto::envoy::config::core::v3::SubstitutionFormatString;
use vmesh_proto::envoy::config::core::v3::substitution_format_string::Format;
use vmesh_proto::envoy::extensions::access_loggers::stream::v3::StdoutAccessLog;
use vmesh_proto::envoy::extensions::access_loggers::stream::v3::stdout_access_log::AccessLogFormat;
use vmesh_proto::envoy::r#type::matcher::v3::metadata_matcher::{PathSegment, path_segment};
use vmesh_proto::envoy::r#type::matcher::v3::value_matcher::MatchPattern;
use vmesh_proto::envoy::r#type::matcher::v3::{MetadataMatcher, ValueMatcher};
use vmesh_proto::google::protobuf::{Struct, Value, value};

use crate::tls::exact;

/// The metadata in which Envoy's RBAC filter leaves its decisions.
const DECISIONS: &str = "envoy.filters.http.rbac";
const ENFORCED: &str = "enforced_engine_result";
const AUDITED: &str = "shadow_engine_result";

/// Returns the log of requests to `service` that are refused. The path is logged without the query, which may hold secrets.
pub(crate) fn log(service: &str) -> AccessLog {
    let filters = [ENFORCED, AUDITED].map(is_denied).into();
    let decision = |key: &str| format!("%DYNAMIC_METADATA({DECISIONS}:{key})%");
    let fields = [
        ("vmesh", "access".to_owned()),
        ("time", "%START_TIME%".to_owned()),
        ("service", service.to_owned()),
        ("enforced", decision(ENFORCED)),
        ("audit", decision(AUDITED)),
        ("caller", "%DOWNSTREAM_PEER_URI_SAN%".to_owned()),
        ("node", "%DOWNSTREAM_PEER_DNS_SAN%".to_owned()),
        ("address", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%".to_owned()),
        ("method", "%REQ(:METHOD)%".to_owned()),
        ("path", "%PATH(NQ:PATH)%".to_owned()),
        ("status", "%RESPONSE_CODE%".to_owned()),
    ];
    let text = |text: String| Value { kind: Some(value::Kind::StringValue(text)) };
    let fields: BTreeMap<_, _> = fields.map(|(name, value)| (name.to_owned(), text(value))).into();
    let format = SubstitutionFormatString {
        omit_empty_values: true,
        format: Some(Format::JsonFormat(Struct { fields })),
        ..SubstitutionFormatString::default()
    };
    let to_output = StdoutAccessLog { access_log_format: Some(AccessLogFormat::LogFormat(format)) };
    AccessLog {
        name: "envoy.access_loggers.stdout".to_owned(),
        filter: Some(AccessLogFilter {
            filter_specifier: Some(FilterSpecifier::OrFilter(OrFilter { filters })),
        }),
        config_type: Some(ConfigType::TypedConfig(any(&to_output))),
    }
}

/// Matches requests that the RBAC filter denied, by the decision under `key`.
fn is_denied(key: &str) -> AccessLogFilter {
    let segment = PathSegment { segment: Some(path_segment::Segment::Key(key.to_owned())) };
    let denied = ValueMatcher { match_pattern: Some(MatchPattern::StringMatch(exact("denied".to_owned()))) };
    let matcher = MetadataMatcher {
        filter: DECISIONS.to_owned(),
        path: vec![segment],
        value: Some(denied),
        ..MetadataMatcher::default()
    };
    let filter = MetadataFilter { matcher: Some(matcher), match_if_key_not_found: Some(boolean(false)) };
    AccessLogFilter { filter_specifier: Some(FilterSpecifier::MetadataFilter(filter)) }
}
