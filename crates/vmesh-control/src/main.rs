use std::process::ExitCode;

fn main() -> ExitCode {
    vmesh_control::main()
}
